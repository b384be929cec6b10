"""Running a bundle: images in, classes out. Imports neither torch nor onnx."""

from rxdeploy.runtime.batching import Batching, Closed, DeadlineExceeded, Rejected
from rxdeploy.runtime.session import Classified, Prediction, Session, load

__all__ = ["Batching", "Classified", "Closed", "DeadlineExceeded", "Prediction", "Rejected", "Session", "load"]
