"""rxdeploy compiles the Gluon ResNeXt classifiers into validated TensorRT engines."""

__version__ = "0.1.0"
