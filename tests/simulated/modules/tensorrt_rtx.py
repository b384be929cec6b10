"""Stands for NVIDIA's module of this name; see standin."""

from standin.api import members

globals().update(members("tensorrt_rtx"))
