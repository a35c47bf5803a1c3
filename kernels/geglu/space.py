"""Launch parameters, configuration space and traffic of GeGLU: those of SwiGLU."""

from aifactory_train.kernels.swiglu.space import CHECKS, build

OPERATOR = build("geglu", 1, CHECKS, flops=10)
