"""timm backbones (imported as ``colt5_vision.models``)."""
