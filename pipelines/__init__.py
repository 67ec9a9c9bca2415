"""diffusers attention processors (imported as ``colt5_vision.pipelines``)."""
