"""Room of the diffusers attention processors (imported as ``colt5_vision.pipelines``); nothing is in it yet."""
