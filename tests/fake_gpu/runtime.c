// A CUDA runtime whose device is host memory and whose kernels do nothing. PyTorch's CUDA build and Triton take it for a
// GPU: it shows control flow, devices, streams, graphs and argument packing, and counts. It shows no numbers, no races
// and no speed. It is preloaded before the libraries of PyTorch; functions that nobody needs are generated beside it.
//
// What a GPU would refuse is counted and printed by `problem`; the tests fail on it.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cuda_runtime_api.h>

#define OK return cudaSuccess
#define MAX_BLOCKS (1 << 17)
#define MAX_STREAMS 4096
#define MAX_COPIED ((size_t)4 << 20)  // longer copies are left out: no test looks at what they would bring
#define MEMORY ((size_t)80 << 30)
#define GUARD ((size_t)2 << 20)

// ---- what is counted, read by ctypes -------------------------------------------------------------------------------

static long launches, synchronizations, problems;
static char last_problem[512];

long fake_gpu_launches(void) { return launches; }
long fake_gpu_synchronizations(void) { return synchronizations; }
long fake_gpu_problems(void) { return problems; }
const char *fake_gpu_last_problem(void) { return last_problem; }
void fake_gpu_forget_problems(void) { problems = 0; }

static void problem(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_problem, sizeof last_problem, format, arguments);
  va_end(arguments);
  __atomic_fetch_add(&problems, 1, __ATOMIC_RELAXED);
  fprintf(stderr, "fake GPU: %s\n", last_problem);
}

static void synchronize(void) { __atomic_fetch_add(&synchronizations, 1, __ATOMIC_RELAXED); }

// ---- memory --------------------------------------------------------------------------------------------------------

enum { FREE, HOST, DEVICE };
typedef struct {
  char *start;
  size_t size;
  int kind, device;
} Block;

static Block blocks[MAX_BLOCKS];
static int num_blocks;
static size_t used;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;  // device

static Block *block_of(const void *address) {
  for (int i = num_blocks - 1; i >= 0; i--) {
    const Block *b = &blocks[i];
    if (b->kind != FREE && (char *)address >= b->start && (char *)address < b->start + b->size) return (Block *)b;
  }
  return NULL;
}

static void add_block(void *start, size_t size, int kind) {
  pthread_mutex_lock(&mutex);
  int i = 0;
  while (i < num_blocks && blocks[i].kind != FREE) i++;
  if (i == MAX_BLOCKS) abort();
  if (i == num_blocks) num_blocks++;
  blocks[i] = (Block){start, size, kind, current};
  if (kind == DEVICE) used += size;
  pthread_mutex_unlock(&mutex);
}

static size_t remove_block(const void *start) {
  size_t size = 0;
  pthread_mutex_lock(&mutex);
  Block *b = block_of(start);
  if (b && b->start == start) {
    size = b->size;
    if (b->kind == DEVICE) used -= size;
    b->kind = FREE;
  }
  pthread_mutex_unlock(&mutex);
  return size;
}

static Block find_block(const void *address) {
  pthread_mutex_lock(&mutex);
  const Block *found = block_of(address);
  Block copy = found ? *found : (Block){0};
  pthread_mutex_unlock(&mutex);
  return copy;
}

// The device whose memory holds an address; -1 for memory of the host, -2 for none or what was freed.
int fake_gpu_device_of(const void *address) {
  Block b = find_block(address);
  return b.kind == DEVICE ? b.device : b.kind == HOST ? -1 : -2;
}

cudaError_t cudaMalloc(void **p, size_t size) {
  *p = NULL;
  if (used + size > MEMORY) return cudaErrorMemoryAllocation;
  void *m = mmap(0, size + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return cudaErrorMemoryAllocation;
  add_block(*p = m, size, DEVICE);
  OK;
}
cudaError_t cudaFree(void *p) {
  size_t size = p ? remove_block(p) : 0;
  if (size) munmap(p, size + GUARD);
  OK;
}
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return cudaMalloc(p, size); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  if (posix_memalign(p, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
  add_block(*p, size, HOST);
  OK;
}
cudaError_t cudaFreeHost(void *p) {
  remove_block(p);
  free(p);
  OK;
}
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
  add_block(p, size, HOST);
  OK;
}
cudaError_t cudaHostUnregister(void *p) {
  remove_block(p);
  OK;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = MEMORY;
  *available = MEMORY - used;
  OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  Block b = find_block(p);
  memset(a, 0, sizeof *a);
  a->type = b.kind == HOST ? cudaMemoryTypeHost : b.kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = b.device;
  a->devicePointer = a->hostPointer = (void *)p;
  OK;
}

// ---- devices -------------------------------------------------------------------------------------------------------

static int num_devices(void) {
  const char *text = getenv("FAKE_GPU_DEVICES");
  return text ? atoi(text) : 1;
}

cudaError_t cudaGetDeviceCount(int *n) {
  *n = num_devices();
  OK;
}
cudaError_t cudaGetDevice(int *d) {
  *d = current;
  OK;
}
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= num_devices()) return cudaErrorInvalidDevice;
  current = d;
  OK;
}
cudaError_t cudaDeviceSynchronize(void) {
  synchronize();
  OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *p, int a, int b) {
  *p = 1;
  OK;
}
cudaError_t cudaDeviceEnablePeerAccess(int a, unsigned flags) { OK; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int n, int d) {
  snprintf(text, n, "0000:%02d:00.0", d);
  OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  OK;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int d) {
  *pool = (cudaMemPool_t)1;
  OK;
}

// An H100's.
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 FAKE");
  p->totalGlobalMem = MEMORY;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = p->managedMemory = 1;
  p->memoryBusWidth = 5120;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  OK;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int d) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, d);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    default: *value = 1;
  }
  OK;
}
cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  OK;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  OK;
}
const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : "an error of the fake GPU";
}
const char *cudaGetErrorName(cudaError_t e) { return "cudaErrorFakeGpu"; }

static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **p, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *p = driver ? dlsym(driver, name) : NULL;
  if (!*p) *p = (void *)nothing;
  if (status) *status = cudaDriverEntryPointSuccess;
  OK;
}

// ---- streams and graphs --------------------------------------------------------------------------------------------

static int stream_devices[MAX_STREAMS];
static long num_streams = 1;  // 0 is the default stream of every device
static uintptr_t num_handles;
static cudaStream_t captured;
static int capturing;
static unsigned long long capture_id;

static void *new_handle(void) { return (void *)(__atomic_add_fetch(&num_handles, 1, __ATOMIC_RELAXED) * 64); }
static int is_captured(cudaStream_t s) { return capturing && s == captured; }

// Handles of streams are beyond those of anything else, and say their number.
#define FIRST_STREAM ((uintptr_t)1 << 40)
static int device_of_stream(cudaStream_t s) {
  uintptr_t number = ((uintptr_t)s - FIRST_STREAM) / 64;
  return (uintptr_t)s >= FIRST_STREAM && number < MAX_STREAMS ? stream_devices[number] : current;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  long number = __atomic_fetch_add(&num_streams, 1, __ATOMIC_RELAXED);
  if (number >= MAX_STREAMS) abort();
  stream_devices[number] = current;
  *s = (cudaStream_t)(FIRST_STREAM + number * 64);
  OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
  *p = 0;
  OK;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (is_captured(s)) {
    problem("a stream is queried while it is captured");
    return cudaErrorStreamCaptureUnsupported;
  }
  OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (capturing) {
    problem("a stream is synchronized during a capture");
    return cudaErrorStreamCaptureUnsupported;
  }
  synchronize();
  OK;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) { OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
  f(data);
  OK;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  captured = s;
  capturing = 1;
  capture_id++;
  OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  capturing = 0;
  *graph = new_handle();
  OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = is_captured(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  OK;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  if (id) *id = capture_id;
  if (graph) *graph = (cudaGraph_t)1;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { OK; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t graph, unsigned long long flags) {
  *x = new_handle();
  OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) { OK; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { OK; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) { OK; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = 1;
  OK;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { OK; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t n, cudaGraphNode_t *d, cudaGraphEdgeData *e, size_t *count) {
  *count = 0;
  OK;
}

// ---- events: an event is over with the next synchronization ---------------------------------------------------------

typedef struct {
  double milliseconds;
  long synchronizations;
} Event;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  *e = (cudaEvent_t)calloc(1, sizeof(Event));
  OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  free(e);
  OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  *(Event *)e = (Event){now(), synchronizations};
  OK;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (capturing) problem("an event is queried during a capture");
  return ((Event *)e)->synchronizations == synchronizations ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  synchronize();
  OK;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = ((Event *)end)->milliseconds - ((Event *)start)->milliseconds + 1e-3;
  OK;
}

// ---- copies --------------------------------------------------------------------------------------------------------

static void copy(void *to, const void *from, size_t size) {
  if (size <= MAX_COPIED) memmove(to, from, size);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  copy(to, from, size);
  OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
  if (is_captured(s) && kind == cudaMemcpyHostToDevice && find_block(from).kind != HOST)
    problem("a copy from pageable memory is captured");
  if (kind == cudaMemcpyHostToDevice && find_block(to).kind != DEVICE) problem("a copy to memory of no device");
  copy(to, from, size);
  OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t s) {
  copy(to, from, size);
  OK;
}
cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t s) {
  for (size_t i = 0; i < height; i++) copy((char *)to + i * to_pitch, (char *)from + i * from_pitch, width);
  OK;
}
cudaError_t cudaMemset(void *p, int value, size_t size) {
  if (size <= MAX_COPIED) memset(p, value, size);
  OK;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) { return cudaMemset(p, value, size); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  static char memory[1 << 20];
  *p = memory;
  OK;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// Called by the driver for Triton's kernels too.
void fake_gpu_launch(const unsigned grid[3], const unsigned block[3], unsigned shared, void *stream) {
  unsigned threads = block[0] * block[1] * block[2];
  __atomic_fetch_add(&launches, 1, __ATOMIC_RELAXED);
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535 || !threads || threads > 1024)
    problem("a launch of %u x %u x %u blocks of %u threads", grid[0], grid[1], grid[2], threads);
  if (shared > 232448) problem("a launch with %u bytes of shared memory", shared);
  if (device_of_stream(stream) != current)
    problem("a launch on device %d in a stream of device %d", current, device_of_stream(stream));
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} call;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *s) {
  call.grid = grid;
  call.block = block;
  call.shared = shared;
  call.stream = s;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *s) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(cudaStream_t *)s = call.stream;
  OK;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
  fake_gpu_launch(&grid.x, &block.x, shared, s);
  OK;
}
cudaError_t __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(f, grid, block, arguments, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **arguments) {
  return cudaLaunchKernel(f, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned x) {
  *n = 2;
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, b, s, 0);
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
char __cudaInitModule(void **handle) { return 1; }

// ---- cuBLAS: what hands something back ------------------------------------------------------------------------------

int cublasCreate_v2(void **handle) { return *handle = (void *)64, 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulDescCreate(void **handle, int compute, int scale) { return *handle = (void *)64, 0; }
int cublasLtMatmulPreferenceCreate(void **handle) { return *handle = (void *)64, 0; }
int cublasLtMatrixLayoutCreate(void **handle, int type, unsigned long rows, unsigned long cols, long stride) {
  return *handle = (void *)64, 0;
}
int cublasLtMatmulAlgoGetHeuristic(
    void *h, void *operation, void *a, void *b, void *c, void *d, void *preference, int n, void *results, int *found) {
  return *found = 1, 0;
}
unsigned long cublasLtGetVersion(void) { return 130100; }
