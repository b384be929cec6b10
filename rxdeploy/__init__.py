"""rxdeploy compiles the Gluon ResNeXt classifiers to validated ONNX models and TensorRT engines."""

__version__ = "0.1.0"
