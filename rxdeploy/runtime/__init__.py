"""Running a bundle: images in, classes out. Imports neither torch nor onnx."""

from rxdeploy.runtime.session import Prediction, Session, load

__all__ = ["Prediction", "Session", "load"]
