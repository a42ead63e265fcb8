// A stand-in for libcuda.so.1 with which the driver's callers are tested where there is no GPU. Compiled with the toolkit's
// own header, so that names, numbers and layouts are NVIDIA's; device memory is host memory, and a kernel's launch is only
// written down. Queued work runs as late as the driver's rules allow: a caller that reuses a page-locked buffer too early,
// or reads a result before it waits, gets wrong bytes.
#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

using Work = std::function<void()>;

struct Event {
    size_t position = 0;
};
struct Graph {
    std::vector<Work> work;
};

struct StandIn {
    std::map<std::string, int> settings;
    std::map<std::string, int> failures;
    std::vector<Work> queue;
    size_t done = 0;
    bool capturing = false;
    Graph recorded;
    std::map<uintptr_t, size_t> locked;
    std::set<void*> alive;
    int contexts = 0;
    CUlaunchConfig config;
    std::vector<CUlaunchAttribute> attributes;
    std::vector<uint8_t> argument;
    int dynamic_shared = 0;
    int launches = 0;
} state;

thread_local CUcontext current = nullptr;
int the_context, the_stream, the_function;

int setting(const char* name) { return state.settings.count(name) ? state.settings[name] : 0; }

// The status that a test wants of this function, and what the driver says without a context.
CUresult status(const char* function, bool needs_context = true) {
    if (state.failures.count(function)) return CUresult(state.failures[function]);
    return needs_context && current == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

void run_until(size_t position) {
    while (state.done < position) state.queue[state.done++]();
}

void enqueue(Work work) {
    if (state.capturing) state.recorded.work.push_back(work);
    else state.queue.push_back(work);
}

bool is_locked(const void* memory, size_t bytes) {
    auto after = state.locked.upper_bound(uintptr_t(memory));
    if (after == state.locked.begin()) return false;
    --after;
    return uintptr_t(memory) + bytes <= after->first + after->second;
}

template <typename T>
T* made(T* thing) {
    state.alive.insert(thing);
    return thing;
}
template <typename T>
void gone(T* thing) {
    if (state.alive.erase(thing)) delete thing;
}

}  // namespace

#define TRY(function)                                                       \
    if (CUresult result = status(function); result != CUDA_SUCCESS) return result

extern "C" {

// ---- what tests ask

void stand_in_reset() { state = StandIn(); }
void stand_in_set(const char* name, int value) { state.settings[name] = value; }
void stand_in_fail(const char* function, int with) { state.failures[function] = with; }
int stand_in_alive() { return int(state.alive.size() + state.locked.size()) + state.contexts; }
int stand_in_launches() { return state.launches; }
int stand_in_dynamic_shared() { return state.dynamic_shared; }
size_t stand_in_argument(uint8_t* to) {
    memcpy(to, state.argument.data(), state.argument.size());
    return state.argument.size();
}
// Grid, block, shared bytes, cluster (0 without the attribute), overlap: 9 numbers.
void stand_in_launch(uint32_t* to) {
    const CUlaunchConfig& c = state.config;
    const uint32_t shape[7] = {c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ, c.sharedMemBytes};
    memcpy(to, shape, sizeof shape);
    to[7] = to[8] = 0;
    for (const CUlaunchAttribute& a : state.attributes) {
        if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && a.value.clusterDim.y == 1 && a.value.clusterDim.z == 1) to[7] = a.value.clusterDim.x;
        if (a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) to[8] = a.value.programmaticStreamSerializationAllowed;
    }
}

// ---- the driver

CUresult cuInit(unsigned flags) { return flags == 0 ? status("cuInit", false) : CUDA_ERROR_INVALID_VALUE; }
CUresult cuDriverGetVersion(int* version) {
    *version = setting("version");
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : nullptr;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : nullptr;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDeviceGetCount(int* count) {
    *count = setting("devices");
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal + 40;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int len, CUdevice) {
    strncpy(name, "Stand-in", size_t(len));
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (device < 40) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = setting("capability") / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = setting("capability") % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
    *bytes = size_t(80) << 30;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetPCIBusId(char* id, int len, CUdevice) {
    strncpy(id, "0000:07:00.0", size_t(len));
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    if (CUresult result = status("cuDevicePrimaryCtxRetain", false); result != CUDA_SUCCESS) return result;
    state.contexts++;
    *context = reinterpret_cast<CUcontext>(&the_context);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    state.contexts--;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
    TRY("cuMemGetInfo");
    *free = size_t(70) << 30;
    *total = size_t(80) << 30;
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    TRY("cuMemAlloc");
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(memory, 0xff, bytes);
    state.alive.insert(memory);
    *address = CUdeviceptr(memory);
    return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
    run_until(state.queue.size());
    if (state.alive.erase(reinterpret_cast<void*>(address)) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(reinterpret_cast<void*>(address));
    return status("cuMemFree");
}
CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    TRY("cuMemHostAlloc");
    *memory = malloc(bytes);
    memset(*memory, 0xff, bytes);
    state.locked[uintptr_t(*memory)] = bytes;
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void* memory) {
    TRY("cuMemFreeHost");
    if (state.locked.erase(uintptr_t(memory)) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(memory);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
    TRY("cuMemcpyHtoDAsync");
    void* target = reinterpret_cast<void*>(to);
    if (is_locked(from, bytes)) {
        enqueue([=] { memcpy(target, from, bytes); });
    } else {
        std::vector<uint8_t> taken(static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + bytes);
        enqueue([=] { memcpy(target, taken.data(), bytes); });
    }
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream) {
    TRY("cuMemcpyDtoHAsync");
    enqueue([=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    TRY("cuMemcpyDtoDAsync");
    enqueue([=] { memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream) {
    TRY("cuMemsetD8Async");
    enqueue([=] { memset(reinterpret_cast<void*>(to), byte, bytes); });
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
    if (int with = setting("module status")) {
        for (unsigned i = 0; i + 1 < count; i++) {
            if (options[i] == CU_JIT_ERROR_LOG_BUFFER && options[i + 1] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES) {
                strncpy(static_cast<char*>(values[i]), "ptxas said no", size_t(values[i + 1]));
            }
        }
        return CUresult(with);
    }
    TRY("cuModuleLoadDataEx");
    // A fatbin begins with this.
    if (*static_cast<const uint32_t*>(image) != 0xba55ed50) return CUDA_ERROR_INVALID_IMAGE;
    *module = reinterpret_cast<CUmodule>(made(new int));
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    TRY("cuModuleUnload");
    gone(reinterpret_cast<int*>(module));
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    TRY("cuModuleGetFunction");
    if (strcmp(name, "the_kernel") != 0) return CUDA_ERROR_NOT_FOUND;
    *function = reinterpret_cast<CUfunction>(&the_function);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    TRY("cuFuncGetAttribute");
    if (attribute != CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    *value = 1024;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    TRY("cuFuncSetAttribute");
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    state.dynamic_shared = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction, size_t index, size_t* offset, size_t* bytes) {
    TRY("cuFuncGetParamInfo");
    if (index != 0) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *bytes = 24;
    return CUDA_SUCCESS;
}
CUresult cuFuncLoad(CUfunction) { return status("cuFuncLoad"); }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
    TRY("cuLaunchKernelEx");
    if (function != reinterpret_cast<CUfunction>(&the_function) || extra != nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (config->hStream != reinterpret_cast<CUstream>(&the_stream)) return CUDA_ERROR_INVALID_HANDLE;
    state.config = *config;
    state.attributes.assign(config->attrs, config->attrs + config->numAttrs);
    state.argument.assign(static_cast<uint8_t*>(params[0]), static_cast<uint8_t*>(params[0]) + 24);
    enqueue([] { state.launches++; });
    return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
    const cuuint32_t* boxes, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    if (uintptr_t(map) % 64 != 0 || rank != 2 || steps[0] != 1 || steps[1] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
    if (promotion != CU_TENSOR_MAP_L2_PROMOTION_L2_256B || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return CUDA_ERROR_INVALID_VALUE;
    if (strides[0] % 16 != 0 || uintptr_t(address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t words[7] = {uint64_t(type), uint64_t(address), sizes[0], sizes[1], strides[0], boxes[0], boxes[1]};
    memcpy(map, words, sizeof words);
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    TRY("cuStreamCreate");
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = reinterpret_cast<CUstream>(&the_stream);
    state.alive.insert(&the_stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream) {
    TRY("cuStreamDestroy");
    state.alive.erase(&the_stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) {
    if (state.capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    run_until(state.queue.size());
    return status("cuStreamSynchronize");
}
CUresult cuStreamBeginCapture(CUstream, CUstreamCaptureMode mode) {
    TRY("cuStreamBeginCapture");
    if (state.capturing || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_ILLEGAL_STATE;
    state.capturing = true;
    state.recorded = Graph();
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
    state.capturing = false;
    TRY("cuStreamEndCapture");
    *graph = reinterpret_cast<CUgraph>(made(new Graph(state.recorded)));
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
    TRY("cuGraphInstantiateWithFlags");
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *exec = reinterpret_cast<CUgraphExec>(made(new Graph(*reinterpret_cast<Graph*>(graph))));
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    gone(reinterpret_cast<Graph*>(graph));
    return CUDA_SUCCESS;
}
CUresult cuGraphUpload(CUgraphExec, CUstream) { return status("cuGraphUpload"); }
CUresult cuGraphLaunch(CUgraphExec exec, CUstream) {
    TRY("cuGraphLaunch");
    for (const Work& work : reinterpret_cast<Graph*>(exec)->work) state.queue.push_back(work);
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
    gone(reinterpret_cast<Graph*>(exec));
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    TRY("cuEventCreate");
    if ((flags & ~unsigned(CU_EVENT_BLOCKING_SYNC)) != 0) return CUDA_ERROR_INVALID_VALUE;
    *event = reinterpret_cast<CUevent>(made(new Event));
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) {
    gone(reinterpret_cast<Event*>(event));
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream) {
    TRY("cuEventRecord");
    reinterpret_cast<Event*>(event)->position = state.queue.size();
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    TRY("cuEventSynchronize");
    run_until(reinterpret_cast<Event*>(event)->position);
    return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent event) {
    TRY("cuEventQuery");
    return state.done >= reinterpret_cast<Event*>(event)->position ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    TRY("cuEventElapsedTime");
    *milliseconds = float(reinterpret_cast<Event*>(to)->position - reinterpret_cast<Event*>(from)->position);
    return CUDA_SUCCESS;
}

}  // extern "C"
