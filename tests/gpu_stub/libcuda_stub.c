// A CUDA driver with one device, that loads anything and launches nothing: with it Triton's own
// compiler and launcher run on a CPU. It refuses what an H100 refuses of a launch, and to load
// while its stream is said to be capturing, and counts.
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>

enum { kCapability = 9, kProcessors = 132, kMostThreads = 1024, kMostGridYZ = 65535 };
enum { kSharedOfBlock = 227 << 10, kSharedOfAll = 228 << 10, kRegisters = 65536, kWarp = 32 };

// What tests/gpu_stub/driver.py reads and sets.
struct Counts {
  long launched, refused, loaded, largest_shared;
};
struct Counts stub_counts;
int stub_capturing;

static CUcontext context(void) { return (CUcontext)1; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = kCapability; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = kProcessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = kSharedOfBlock; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = kSharedOfAll; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = kRegisters; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = kWarp; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
  *made = context();
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context();
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext wanted) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
              ? "operation not permitted when stream is capturing"
              : "refused by the driver's stand-in";
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (stub_capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = (CUmodule)(intptr_t)(++stub_counts.loaded);
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? kMostThreads : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction f, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data,
                                CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) *(CUdeviceptr*)data[i] = pointer;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = stub_capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuStreamGetCtx(CUstream stream, CUcontext* found) {
  *found = context();
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  if (config->gridDimX > INT32_MAX || config->gridDimY > kMostGridYZ ||
      config->gridDimZ > kMostGridYZ || config->blockDimX > kMostThreads ||
      config->sharedMemBytes > kSharedOfBlock) {
    ++stub_counts.refused;
    fprintf(stderr, "a GPU refuses this launch: grid %u %u %u, %u threads, %u bytes\n",
            config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
            config->sharedMemBytes);
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++stub_counts.launched;
  if (config->sharedMemBytes > stub_counts.largest_shared)
    stub_counts.largest_shared = config->sharedMemBytes;
  return CUDA_SUCCESS;
}
