/* A CANN runtime for tests. Device memory is host memory; devices, streams and events do nothing. Every function that
   would launch a kernel fails, so that no native operator seems to have computed. */
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define SUCCESS 0
#define NO_KERNEL 500002

static __thread int32_t current;
static char contexts[64];
static int64_t options[128];

static int64_t *option(int number) { return &options[number & 127]; }
static size_t held; /* bytes of allocated device memory, which vLLM's memory profile reads */
static int take(void **out, size_t bytes) { return posix_memalign(out, 512, bytes ? bytes : 512); }
static int take_device(void **out, size_t bytes) {
  int failed = take(out, bytes);
  if (!failed) __atomic_add_fetch(&held, malloc_usable_size(*out), __ATOMIC_RELAXED);
  return failed;
}
static int handle(void **out) { return (*out = calloc(1, 64)) ? SUCCESS : 1; }

API int aclInit(const char *path) { return SUCCESS; }
API int aclFinalize(void) { return SUCCESS; }
API const char *aclrtGetSocName(void) { const char *name = getenv("STUB_SOC"); return name ? name : "Ascend910B3"; }
API const char *aclGetRecentErrMsg(void) { return "stub CANN: no kernel runs here"; }
API int aclrtGetVersion(int32_t *major, int32_t *minor, int32_t *patch) { *major = 1; *minor = *patch = 0; return SUCCESS; }

API int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return SUCCESS; }
API int aclrtGetDevice(int32_t *device) { *device = current; return SUCCESS; }
API int aclrtSetDevice(int32_t device) { current = device; return SUCCESS; }
API int aclrtResetDevice(int32_t device) { return SUCCESS; }
API int aclrtSynchronizeDevice(void) { return SUCCESS; }
API int aclrtGetCurrentContext(void **context) { *context = contexts + current; return SUCCESS; }
API int aclrtSetCurrentContext(void *context) { current = (char *)context - contexts; return SUCCESS; }
API int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 1; return SUCCESS; }

API int aclrtCreateStream(void **stream) { return handle(stream); }
API int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return handle(stream); }
API int aclrtDestroyStream(void *stream) { free(stream); return SUCCESS; }
API int aclrtSynchronizeStream(void *stream) { return SUCCESS; }
API int aclrtStreamQuery(void *stream, int *status) { *status = 1; return SUCCESS; }
API int aclrtStreamWaitEvent(void *stream, void *event) { return SUCCESS; }
API int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return SUCCESS; }
API int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return handle(event); }
API int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return handle(event); }
API int aclrtDestroyEvent(void *event) { free(event); return SUCCESS; }
API int aclrtRecordEvent(void *event, void *stream) { return SUCCESS; }
API int aclrtSynchronizeEvent(void *event) { return SUCCESS; }
API int aclrtResetEvent(void *event, void *stream) { return SUCCESS; }
API int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return SUCCESS; }
API int aclrtEventElapsedTime(float *ms, void *from, void *to) { *ms = 0; return SUCCESS; }

API int aclrtMalloc(void **out, size_t bytes, int policy) { return take_device(out, bytes); }
API int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return take_device(out, bytes); }
API int aclrtMallocHost(void **out, size_t bytes) { return take(out, bytes); }
API int aclrtFree(void *memory) {
  if (memory) __atomic_sub_fetch(&held, malloc_usable_size(memory), __ATOMIC_RELAXED);
  free(memory);
  return SUCCESS;
}
API int aclrtFreeHost(void *memory) { free(memory); return SUCCESS; }
API int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { memmove(to, from, bytes); return SUCCESS; }
API int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) { memmove(to, from, bytes); return SUCCESS; }
API int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) { memset(to, value, bytes); return SUCCESS; }
API int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) { memset(to, value, bytes); return SUCCESS; }
API int aclrtGetMemInfo(int kind, size_t *left, size_t *whole) {
  *whole = (size_t)4 << 30;
  *left = *whole - held;
  return SUCCESS;
}

API int aclrtSetOpWaitTimeout(uint32_t seconds) { return SUCCESS; }
API int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return SUCCESS; }
API int aclrtSetDeviceSatMode(int mode) { return SUCCESS; }
API int aclSetCompileopt(int name, const char *value) { return SUCCESS; }
API int aclrtGetSysParamOpt(int number, int64_t *value) { *value = *option(number); return SUCCESS; }
API int aclrtSetSysParamOpt(int number, int64_t value) { *option(number) = value; return SUCCESS; }
API int aclrtCtxGetSysParamOpt(int number, int64_t *value) { *value = *option(number); return SUCCESS; }
API int aclrtCtxSetSysParamOpt(int number, int64_t value) { *option(number) = value; return SUCCESS; }

API int aclopCompileAndExecute(void) { return NO_KERNEL; }
API int aclopExecuteV2(void) { return NO_KERNEL; }
API int rtKernelLaunch(void) { return NO_KERNEL; }
