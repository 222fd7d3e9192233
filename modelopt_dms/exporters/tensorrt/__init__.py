# SPDX-License-Identifier: Apache-2.0
"""TensorRT engines with our kernels: PTX in TensorRT's argument order, and the plugins that embed it."""
