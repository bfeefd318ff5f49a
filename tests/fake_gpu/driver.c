// A CUDA driver, libcuda.so.1, that loads every module and runs nothing: what Triton asks of one. It counts launches in
// the runtime beside it. Functions that nobody needs are generated.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"
#undef cuDevicePrimaryCtxRetain
#undef cuCtxGetCurrent

#define OK return CUDA_SUCCESS

int cudaGetDevice(int *d);
int cudaSetDevice(int d);
int cudaGetDeviceCount(int *n);
void fake_gpu_launch(const unsigned grid[3], const unsigned block[3], unsigned shared, void *stream);

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *v) {
  *v = 13000;
  OK;
}
CUresult cuGetErrorString(CUresult e, const char **text) {
  *text = "an error of the fake GPU";
  OK;
}
CUresult cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
CUresult cuDeviceGet(CUdevice *d, int ordinal) {
  *d = ordinal;
  OK;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 65536;
  }
  OK;
}

// A context is its device's number plus 1.
CUresult cuCtxGetCurrent(CUcontext *c) {
  int device;
  cudaGetDevice(&device);
  *c = (CUcontext)(uintptr_t)(device + 1);
  OK;
}
CUresult cuCtxSetCurrent(CUcontext c) { return c ? cudaSetDevice((int)(uintptr_t)c - 1) : CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  *c = (CUcontext)(uintptr_t)(d + 1);
  OK;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  OK;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  OK;
}

CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  *m = (CUmodule)image;
  OK;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)strdup(name);
  OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  OK;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr p) {
  *(uint64_t *)data = (uint64_t)p;
  OK;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 1;
  OK;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  fake_gpu_launch(&c->gridDimX, &c->blockDimX, c->sharedMemBytes, c->hStream);
  OK;
}
