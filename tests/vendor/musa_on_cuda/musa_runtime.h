// SPDX-License-Identifier: Apache-2.0
// MUSA's names on top of CUDA, so that the MUSA vendor header and the kernels behind it compile
// with nvcc and run on an NVIDIA GPU. Only what the vendor header uses: another name is an error.
#pragma once
#include <cuda_runtime.h>

using musaError_t = cudaError_t;
using musaStream_t = cudaStream_t;

inline musaError_t musaGetDevice(int* device) { return cudaGetDevice(device); }
inline musaError_t musaSetDevice(int device) { return cudaSetDevice(device); }
inline musaError_t musaGetLastError() { return cudaGetLastError(); }
inline const char* musaGetErrorString(musaError_t error) { return cudaGetErrorString(error); }
