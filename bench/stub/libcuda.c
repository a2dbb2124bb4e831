/* A CUDA driver library that accepts every call and does nothing.

   Triton's own driver module, argument packing and launcher are linked against it and run for real; no kernel runs.
   It counts launches and keeps the last of them: the kernel's name, its grid, its block, its shared memory, the stream
   and the first of its arguments, which is an address in all of ours. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

#define KEPT 4096       /* launches */
#define FUNCTIONS 4096  /* handles: a kernel compiled again gets another */
#define NAME 96

typedef struct {
  char name[NAME];
  unsigned grid[3];
  unsigned block;
  unsigned shared;
  unsigned long long stream;
  unsigned long long first;
} Launch;

static int multiprocessors = 132, shared_per_block = 232448;
static unsigned long long launches;
static Launch kept[KEPT];
static char names[FUNCTIONS][NAME];
static uintptr_t functions;

void stub_describe(int of_multiprocessors, int of_shared) {
  multiprocessors = of_multiprocessors;
  shared_per_block = of_shared;
}
unsigned long long stub_launches(void) { return launches; }
const Launch *stub_launch(unsigned long long number) { return &kept[number % KEPT]; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stub driver"; return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_per_block; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_block + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1000000; /* clock rates and the like, which decide nothing */
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  uintptr_t place = functions++ % FUNCTIONS;
  strncpy(names[place], name, NAME - 1);
  *function = (CUfunction)(place + 1);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer; /* the address on the device: every address is one */
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *elements, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
    const cuuint64_t *strides, const int *lower, const int *upper, cuuint32_t channels, cuuint32_t pixels,
    const cuuint32_t *elements, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (config->gridDimY > 65535 || config->gridDimZ > 65535 || config->sharedMemBytes > (unsigned)shared_per_block)
    return CUDA_ERROR_INVALID_VALUE; /* as a card refuses it */
  Launch *launch = &kept[launches++ % KEPT];
  uintptr_t place = (uintptr_t)function - 1;
  memcpy(launch->name, place < FUNCTIONS ? names[place] : "", place < FUNCTIONS ? NAME : 1);
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->block = config->blockDimX * config->blockDimY * config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  launch->stream = (uintptr_t)config->hStream;
  memcpy(&launch->first, parameters[0], sizeof launch->first);
  return CUDA_SUCCESS;
}
