// Simulated devices of the type "cuda" on a CPU build of PyTorch, in host memory.
//
// Every kernel is the CPU's, run at once on the same bytes. What makes it a device:
//   * tensors are torch's own CUDA tensors: dispatch keys, guards, torch.Stream, torch.Event, torch.accelerator, pinned
//     memory, autograd's device threads;
//   * each kernel, copy and collective is noted with the stream it was issued on. Vector clocks say what is ordered:
//     streams are FIFO, events and host synchronisations join clocks. Two accesses of one range of memory, one of them a
//     write, on two streams without an order between them are a race, whatever this run's timing was;
//   * memory goes back to the stream that allocated it, at once, full of NaN, as a caching allocator might;
//   * a copy to pinned memory arrives when the host has waited for it, and is NaN before; the source of one from pinned
//     memory must not change until then;
//   * tensors of two devices in one kernel are an error, and what would make the host wait is counted, or an error.
// What it cannot show: kernels that CUDA lacks, time, NCCL's own limits.

#include <torch/extension.h>
#include <torch/library.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using Clock = std::vector<uint64_t>;  // by stream
using Guard = std::lock_guard<std::recursive_mutex>;

constexpr int kDevices = 8;
int device_count() {
  const char* text = std::getenv("SIMULATED_DEVICES");
  return text ? std::min(kDevices, std::atoi(text)) : 1;
}

thread_local c10::DeviceIndex current_device = 0;
thread_local int64_t current_stream[kDevices] = {};  // stream ids by device; 0 is the default stream

struct Access {
  int stream;
  uint64_t time;
  uintptr_t low, high;
  bool write;
  std::string what;
};

struct Block {
  size_t size = 0, asked = 0;
  int device = 0, stream = 0;  // the stream it was allocated on
  bool live = false;
  std::set<int> recorded;  // record_stream
  std::vector<Access> log;
};

struct Pending {  // a copy that the device has not done yet, as far as the host knows
  int stream;
  uint64_t time;
  Tensor host, snapshot;
  bool down;
};

struct World {
  std::recursive_mutex mutex;
  std::unordered_map<int64_t, int> numbers;  // device * 2^32 + stream id -> dense number
  std::vector<std::string> names;
  std::vector<Clock> clocks;
  Clock host;  // what the host knows to be over
  std::map<uintptr_t, Block> blocks;
  std::map<std::tuple<int, int, size_t>, std::vector<uintptr_t>> free_lists;
  std::map<uintptr_t, size_t> pinned;
  std::vector<Pending> pending;
  std::vector<std::string> races, syncs;
  std::unordered_map<std::string, int64_t> ops;
  int sync_mode = 0;  // 0: count, 1: warn too, 2: raise
  int64_t next_stream = 1;
  c10::CachingDeviceAllocator::DeviceStats stats[kDevices];
};

World& world() {
  static auto* w = new World();
  return *w;
}

int number_of(int device, int64_t id) {
  auto& w = world();
  int64_t key = (int64_t(device) << 32) + id;
  auto found = w.numbers.find(key);
  if (found != w.numbers.end()) return found->second;
  int number = int(w.clocks.size());
  w.numbers[key] = number;
  w.names.push_back("cuda:" + std::to_string(device) + (id ? " stream " + std::to_string(id) : " default stream"));
  w.clocks.emplace_back();
  return number;
}

int here(int device) { return number_of(device, current_stream[device]); }

uint64_t at_(const Clock& clock, int stream) { return size_t(stream) < clock.size() ? clock[stream] : 0; }

void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// A new piece of work on a stream: it comes after all that the host knew to be over when it issued it.
uint64_t tick(int stream) {
  auto& w = world();
  join(w.clocks[stream], w.host);
  if (w.clocks[stream].size() <= size_t(stream)) w.clocks[stream].resize(stream + 1, 0);
  return ++w.clocks[stream][stream];
}

void race(std::string text) {
  auto& w = world();
  for (auto& other : w.races)
    if (other == text) return;
  if (const char* file = std::getenv("SIMULATED_RACES")) {
    if (FILE* out = std::fopen(file, "a")) {
      std::fprintf(out, "%d %s\n", int(getpid()), text.c_str());
      std::fclose(out);
    }
  }
  if (w.races.size() < 200) w.races.push_back(std::move(text));
}

Block* block_of(uintptr_t address) {
  auto& w = world();
  auto found = w.blocks.upper_bound(address);
  if (found == w.blocks.begin()) return nullptr;
  --found;
  return address < found->first + std::max<size_t>(found->second.size, 1) ? &found->second : nullptr;
}

void access(int stream, uint64_t time, uintptr_t low, uintptr_t high, bool write, const std::string& what) {
  auto& w = world();
  Block* block = block_of(low);
  if (!block || low >= high) return;
  if (!block->live) race(what + " on " + w.names[stream] + " touches memory that was freed");
  auto& clock = w.clocks[stream];
  for (auto& old : block->log) {
    bool meets = low < old.high && old.low < high;
    if (meets && (write || old.write) && old.stream != stream && at_(clock, old.stream) < old.time)
      race(std::string(write ? "write by " : "read by ") + what + " on " + w.names[stream] + " is not ordered after the " +
           (old.write ? "write by " : "read by ") + old.what + " on " + w.names[old.stream]);
  }
  auto covered = [&](const Access& old) {
    bool inside = low <= old.low && old.high <= high;
    bool before = old.stream == stream || at_(clock, old.stream) >= old.time;
    return inside && before && (write || (!old.write && old.stream == stream));
  };
  block->log.erase(std::remove_if(block->log.begin(), block->log.end(), covered), block->log.end());
  block->log.push_back({stream, time, low, high, write, what});
}

std::pair<uintptr_t, uintptr_t> range_of(const Tensor& t) {
  uintptr_t low = uintptr_t(t.const_data_ptr());
  if (!t.numel()) return {low, low};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {low, low + (last + 1) * t.element_size()};
}

void touch(int stream, uint64_t time, const Tensor& t, bool write, const std::string& what) {
  if (!t.defined() || !t.numel() || !t.is_cuda()) return;
  auto [low, high] = range_of(t);
  access(stream, time, low, high, write, what);
}

// What the host now knows to be over has happened.
void arrive() {
  auto& w = world();
  std::vector<Pending> left;
  for (auto& each : w.pending) {
    if (at_(w.host, each.stream) < each.time) {
      left.push_back(each);
    } else if (each.down) {
      std::memcpy(each.host.data_ptr(), each.snapshot.data_ptr(), each.snapshot.nbytes());
    } else if (std::memcmp(each.host.data_ptr(), each.snapshot.data_ptr(), each.snapshot.nbytes())) {
      race("the host wrote pinned memory from which a copy to " + w.names[each.stream] + " was still under way");
    }
  }
  w.pending = std::move(left);
}

void host_waits(const Clock& clock) {
  join(world().host, clock);
  arrive();
}

void sync(const std::string& what) {
  auto& w = world();
  if (w.syncs.size() < 10000) w.syncs.push_back(what);
  TORCH_CHECK(w.sync_mode != 2, "called a synchronizing CUDA operation (", what, ")");
  if (w.sync_mode == 1) TORCH_WARN("called a synchronizing CUDA operation (", what, ")");
}

// -- memory -----------------------------------------------------------------------------------------------------------

void give_back(void* pointer);

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t asked) override {
    auto& w = world();
    Guard guard(w.mutex);
    int device = current_device;
    if (!asked) return {nullptr, nullptr, &give_back, c10::Device(c10::kCUDA, device)};
    size_t size = (asked + 511) / 512 * 512;
    int stream = here(device);
    auto& list = w.free_lists[{device, stream, size}];
    uintptr_t address = 0;
    if (!list.empty()) {
      address = list.back();
      list.pop_back();
    } else {
      void* fresh = nullptr;
      TORCH_CHECK(!posix_memalign(&fresh, 512, size), "out of memory");
      address = uintptr_t(fresh);
      w.blocks[address] = Block();
    }
    auto& block = w.blocks[address];
    block.size = size, block.asked = asked, block.device = device, block.stream = stream, block.live = true;
    std::memset(reinterpret_cast<void*>(address), 0xff, size);
    auto& stats = w.stats[device];
    stats.allocated_bytes[0].increase(size), stats.allocation[0].increase(1), stats.requested_bytes[0].increase(asked);
    return {reinterpret_cast<void*>(address), reinterpret_cast<void*>(address), &give_back, c10::Device(c10::kCUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    auto& w = world();
    Guard guard(w.mutex);
    if (Block* block = block_of(uintptr_t(pointer.get())))
      block->recorded.insert(number_of(stream.device_index(), stream.id()));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return world().stats[device];
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override { world().stats[device].allocated_bytes[0].reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex device) override {
    auto& stats = world().stats[device];
    stats.allocated_bytes[0].reset_peak(), stats.requested_bytes[0].reset_peak();
  }
};
DeviceMemory device_memory;

void give_back(void* pointer) {
  if (!pointer) return;
  auto& w = world();
  Guard guard(w.mutex);
  auto& block = w.blocks[uintptr_t(pointer)];
  block.live = false;
  auto& stats = w.stats[block.device];
  stats.allocated_bytes[0].decrease(block.size), stats.requested_bytes[0].decrease(block.asked);
  Clock known = w.clocks[block.stream];
  join(known, w.host);
  bool unsafe = false;
  for (auto& old : block.log) {
    if (old.stream == block.stream || at_(known, old.stream) >= old.time) continue;
    if (block.recorded.count(old.stream)) {
      unsafe = true;  // the allocator waits with it
    } else {
      race("memory of " + w.names[block.stream] + " was freed while the " + (old.write ? "write by " : "read by ") +
           old.what + " on " + w.names[old.stream] + " may still run");
    }
  }
  block.recorded.clear();
  std::memset(pointer, 0xff, block.size);
  if (!unsafe) w.free_lists[{block.device, block.stream, block.size}].push_back(uintptr_t(pointer));
}

void unpin(void* pointer) {
  auto& w = world();
  Guard guard(w.mutex);
  w.pinned.erase(uintptr_t(pointer));
  std::free(pointer);
}

struct PinnedMemory final : at::HostAllocator {
  at::DataPtr allocate(size_t size) override {
    auto& w = world();
    Guard guard(w.mutex);
    void* fresh = nullptr;
    TORCH_CHECK(!posix_memalign(&fresh, 512, std::max<size_t>(size, 1)), "out of memory");
    std::memset(fresh, 0xff, size);
    w.pinned[uintptr_t(fresh)] = std::bit_ceil(size);  // as torch's own does
    return {fresh, fresh, &unpin, c10::Device(c10::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedMemory pinned_memory;

bool is_pinned(const void* pointer) {
  auto& w = world();
  Guard guard(w.mutex);
  auto found = w.pinned.upper_bound(uintptr_t(pointer));
  if (found == w.pinned.begin()) return false;
  --found;
  return uintptr_t(pointer) < found->first + std::max<size_t>(found->second, 1);
}

// -- devices, streams, events ---------------------------------------------------------------------------------------------

struct Event {
  Clock clock;
};

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() < device_count(), "invalid device ordinal ", int(d.index()));
    if (d.index() >= 0) current_device = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  static int index(c10::Device d) { return d.has_index() ? d.index() : current_device; }
  static c10::Stream make(int device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, c10::DeviceIndex(device)), id);
  }
  c10::Stream getStream(c10::Device d) const override { return make(index(d), current_stream[index(d)]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return make(index(d), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    auto& w = world();
    Guard guard(w.mutex);
    return make(index(d), w.next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = make(s.device_index(), current_stream[s.device_index()]);
    current_stream[s.device_index()] = s.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  c10::DeviceIndex deviceCount() const noexcept override { return c10::DeviceIndex(device_count()); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    auto& w = world();
    Guard guard(w.mutex);
    if (!*event) *event = new Event();
    int stream = number_of(s.device_index(), s.id());
    tick(stream);
    static_cast<Event*>(*event)->clock = w.clocks[stream];
  }
  void block(void* event, const c10::Stream& s) const override {
    auto& w = world();
    Guard guard(w.mutex);
    if (event) join(w.clocks[number_of(s.device_index(), s.id())], static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {  // a device is never sooner ready than it must
    auto& w = world();
    Guard guard(w.mutex);
    if (!event) return true;
    auto& clock = static_cast<Event*>(event)->clock;
    for (size_t i = 0; i < clock.size(); ++i)
      if (at_(w.host, int(i)) < clock[i]) return false;
    return true;
  }
  bool queryStream(const c10::Stream&) const override { return false; }
  void synchronizeStream(const c10::Stream& s) const override {
    auto& w = world();
    Guard guard(w.mutex);
    sync("stream synchronize");
    host_waits(w.clocks[number_of(s.device_index(), s.id())]);
  }
  void synchronizeEvent(void* event) const override {
    auto& w = world();
    Guard guard(w.mutex);
    if (event) host_waits(static_cast<Event*>(event)->clock);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    auto& w = world();
    Guard guard(w.mutex);
    for (auto& clock : w.clocks) join(w.host, clock);
    arrive();
  }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override { device_memory.recordStream(p, s); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};

const SimGuard* guard_impl() {
  static auto* g = new SimGuard();
  return g;
}

}  // namespace

namespace at {
struct SimHooks final : CUDAHooksInterface {
  explicit SimHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex deviceCount() const override { return DeviceIndex(device_count()); }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex d) const override { guard_impl()->setDevice({kCUDA, d}); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return guard_impl()->exchangeDevice({kCUDA, d}).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  int getNumGPUs() const override { return device_count(); }
  Device getDeviceFromPtr(void* p) const override {
    Guard guard(world().mutex);
    Block* block = block_of(uintptr_t(p));
    TORCH_CHECK(block, "no memory of the device");
    return {kCUDA, DeviceIndex(block->device)};
  }
  void deviceSynchronize(DeviceIndex d) const override { guard_impl()->synchronizeDevice(d); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, SimHooks)
}  // namespace at

namespace {

// -- kernels ------------------------------------------------------------------------------------------------------------

// The same bytes as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), t.storage().nbytes(),
      at::DataPtr(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU)), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) alias._set_conj(true);
  if (t.is_neg()) alias._set_neg(true);
  return alias;
}

Tensor empty_on(c10::IntArrayRef size, c10::ScalarType dtype, int device, std::optional<c10::MemoryFormat> format = std::nullopt) {
  c10::DeviceGuard guard(c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
  return Tensor(at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype, format));
}

Tensor strided_on(c10::IntArrayRef size, c10::IntArrayRef stride, c10::ScalarType dtype, int device) {
  c10::DeviceGuard guard(c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
  return Tensor(at::detail::empty_strided_generic(size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype));
}

int device_of(const std::optional<c10::Device>& d) { return d && d->has_index() ? d->index() : current_device; }

Tensor sim_empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device,
                 std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return empty_on(size, c10::dtype_or_default(dtype), device_of(device), format);
}

Tensor sim_empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device> device, std::optional<bool>) {
  return strided_on(size, stride, c10::dtype_or_default(dtype), device_of(device));
}

Tensor sim_as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  at::native::checkInBoundsForStorage<int64_t>(size, stride, offset.value_or(self.storage_offset()), self.dtype(), self.storage());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return out;
}

Tensor sim_view(const Tensor& self, c10::IntArrayRef size) {
  auto found = at::infer_size_dv(size, self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), found);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return sim_as_strided(self, found, *stride, std::nullopt);
}

Tensor sim_reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return sim_as_strided(self, size, stride, std::nullopt);
}

Tensor sim_unfold(const Tensor& self, int64_t d, int64_t size, int64_t step) {

  auto shape = on_cpu(self).unfold(d, size, step);
  return sim_as_strided(self, shape.sizes(), shape.strides(), shape.storage_offset());
}

void grow(const Tensor& t, size_t bytes) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  if (bytes <= storage->nbytes()) return;
  c10::DeviceGuard guard(t.device());
  auto fresh = device_memory.allocate(bytes);
  if (storage->nbytes()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

const Tensor& sim_resize(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format) impl->empty_tensor_restride(*format);
  grow(self, at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.element_size(), self.storage_offset()));
  return self;
}

Tensor& sim_set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> steps(stride.begin(), stride.end());
  if (steps.empty() && !size.empty()) {
    steps.assign(size.size(), 1);
    for (int64_t d = int64_t(size.size()) - 2; d >= 0; --d) steps[d] = steps[d + 1] * std::max<int64_t>(size[d + 1], 1);
  }
  impl->set_sizes_and_strides(size, steps, offset);
  return self;
}

Tensor& sim_set_source(Tensor& self, c10::Storage source) {
  int64_t numel = int64_t(source.nbytes() / self.element_size());
  return sim_set_storage(self, std::move(source), 0, {numel}, {1});
}

Tensor& sim_set_tensor(Tensor& self, const Tensor& source) {
  return sim_set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

c10::Scalar sim_item(const Tensor& self) {
  auto& w = world();
  {
    Guard guard(w.mutex);
    int stream = here(self.get_device());
    uint64_t time = tick(stream);
    touch(stream, time, self, false, "item");
    sync("item");
    host_waits(w.clocks[stream]);
  }
  at::AutoDispatchBelowAutograd below;
  return on_cpu(self).item();
}

bool inside(const Tensor& a, const Tensor& b) {  // whether two host tensors share memory
  auto [low, high] = range_of(a);
  auto [first, last] = range_of(b);
  return low < last && first < high;
}

Tensor& sim_copy(Tensor& self, const Tensor& src, bool non_blocking) {
  auto& w = world();
  at::AutoDispatchBelowAutograd below;
  Guard guard(w.mutex);
  if (!self.numel()) return self;
  int device = self.is_cuda() ? self.get_device() : src.get_device();
  int stream = here(device);
  uint64_t time = tick(stream);
  w.ops["copy_"]++;
  if (self.is_cuda() && src.is_cuda()) {
    touch(stream, time, src, false, "copy_");
    touch(stream, time, self, true, "copy_");
    on_cpu(self).copy_(on_cpu(src));
    return self;
  }
  bool down = src.is_cuda();
  const Tensor& host = down ? static_cast<const Tensor&>(self) : src;
  const Tensor& away = down ? src : static_cast<const Tensor&>(self);
  bool pinned = is_pinned(host.const_data_ptr());
  std::string name = down ? "copy to host" : "copy from host";
  touch(stream, time, away, !down, name);
  if (!down) {  // what the source holds may itself be on its way
    std::vector<Pending> left;
    for (auto& each : w.pending) {
      if (each.down && inside(each.host, src)) {
        if (at_(w.clocks[stream], each.stream) < each.time)
          race("copy from host on " + w.names[stream] + " reads pinned memory to which " + w.names[each.stream] + " still copies");
        std::memcpy(each.host.data_ptr(), each.snapshot.data_ptr(), each.snapshot.nbytes());
      } else {
        left.push_back(each);
      }
    }
    w.pending = std::move(left);
  }
  bool plain = host.is_contiguous() && host.scalar_type() == away.scalar_type();
  if (!non_blocking) {
    sync(name + (pinned ? " (pinned)" : " (pageable)"));
    if (down) self.copy_(on_cpu(src)); else on_cpu(self).copy_(src);
    host_waits(w.clocks[stream]);
  } else if (!pinned || !plain) {  // the driver stages it; of another dtype or layout torch makes a temporary and waits
    if (down) {
      self.copy_(on_cpu(src));
      host_waits(w.clocks[stream]);
    } else {
      on_cpu(self).copy_(src);
    }
  } else if (down) {
    auto snapshot = on_cpu(src).contiguous().clone();
    std::memset(self.data_ptr(), 0xff, self.nbytes());
    w.pending.push_back({stream, time, self, snapshot, true});
  } else {
    on_cpu(self).copy_(src);
    w.pending.push_back({stream, time, src, src.clone(), false});
  }
  return self;
}

void sim_record_stream(Tensor& self, c10::Stream s) { device_memory.recordStream(self.storage().data_ptr(), s); }

const std::unordered_set<std::string> kDataDependent = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::equal", "aten::bincount", "aten::nonzero.out"};
const std::unordered_set<std::string> kHostIndices = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index.Tensor_out"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& w = world();
  const auto& schema = op.schema();
  std::string name = op.operator_name().name + (op.operator_name().overload_name.empty() ? "" : "." + op.operator_name().overload_name);
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  std::vector<Tensor> inputs, outputs;
  std::vector<std::pair<Tensor, Tensor>> grown;  // device tensor, what the CPU resized in its place
  bool host_tensor = false;
  int device = -1;
  auto note = [&](const Tensor& t, bool write) {
    if (!t.defined()) return;
    if (t.is_cuda()) {
      TORCH_CHECK(device < 0 || device == t.get_device(), "Expected all tensors to be on the same device, but found at least two "
                  "devices, cuda:", device, " and cuda:", int(t.get_device()), "! (", name, ")");
      device = t.get_device();
      (write ? outputs : inputs).push_back(t);
    } else if (!t.is_meta() && (t.dim() > 0 || name.rfind("aten::_fused_", 0) == 0)) {
      host_tensor = true;
    }
  };
  std::vector<c10::IValue> before(stack->begin() + begin, stack->end());
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool write = alias && alias->isWrite();
    auto& value = before[i];
    if (value.isTensor()) note(value.toTensor(), write);
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) note(t, write);
    else if (value.isOptionalTensorList()) for (const auto& t : value.toOptionalTensorVector()) if (t) note(*t, write);
    else if (value.isDevice() && value.toDevice().is_cuda()) device = device < 0 ? device_of(value.toDevice()) : device;
  }
  static const bool lenient = std::getenv("SIMULATED_LENIENT") != nullptr;
  TORCH_CHECK(!host_tensor || kHostIndices.count(name) || (lenient && name.rfind("aten::_fused_", 0) != 0), "Expected all tensors to be on the same device, but found at least two devices, "
              "cuda:", device, " and cpu! (when checking arguments of ", name, ")");
  if (device < 0) device = current_device;
  int stream;
  {
    Guard guard(w.mutex);
    stream = here(device);
    uint64_t time = tick(stream);
    w.ops[name]++;
    for (auto& t : inputs) touch(stream, time, t, false, name);
    for (auto& t : outputs) touch(stream, time, t, true, name);
    if (kDataDependent.count(name) || (host_tensor && kHostIndices.count(name))) {
      sync(name);
      host_waits(w.clocks[stream]);
    }
  }
  auto convert = [&](const Tensor& t, bool write) {
    if (write && t.defined() && t.is_cuda() && !t.numel()) {
      auto fresh = at::empty(t.sizes(), t.options().device(c10::kCPU));
      grown.emplace_back(t, fresh);
      return fresh;
    }
    return on_cpu(t);
  };
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool write = alias && alias->isWrite();
    auto& slot = (*stack)[begin + i];
    if (slot.isTensor()) {
      slot = convert(slot.toTensor(), write);
    } else if (slot.isTensorList()) {
      std::vector<Tensor> made;
      for (const Tensor& t : before[i].toTensorVector()) made.push_back(convert(t, write));
      slot = c10::IValue(c10::List<Tensor>(made));
    } else if (slot.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const auto& t : before[i].toOptionalTensorVector()) made.push_back(t ? std::optional<Tensor>(on_cpu(*t)) : std::nullopt);
      slot = c10::IValue(made);
    } else if (slot.isDevice()) {
      slot = c10::Device(c10::kCPU);
    }
  }
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (auto& [t, fresh] : grown) {
    if (!fresh.numel()) continue;
    sim_resize(t, fresh.sizes(), std::nullopt);
    on_cpu(t).copy_(fresh);
  }
  auto bring = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || t.is_cuda()) return t;
    auto made = strided_on(t.sizes(), t.strides(), t.scalar_type(), device);
    if (t.storage_offset() || !t.is_non_overlapping_and_dense()) made = empty_on(t.sizes(), t.scalar_type(), device);
    if (t.numel()) on_cpu(made).copy_(t);
    Guard guard(w.mutex);
    touch(stream, tick(stream), made, true, name);
    return made;
  };
  const size_t returns = schema.returns().size(), first = stack->size() - returns;
  for (size_t i = 0; i < returns; ++i) {
    const auto* alias = schema.returns()[i].alias_info();
    auto& slot = (*stack)[first + i];
    if (alias && alias->isWrite()) {
      for (size_t j = 0; j < count; ++j) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other && other->isWrite() && *other == *alias) slot = before[j];
      }
      continue;
    }
    TORCH_CHECK(!alias, "the simulated device has no kernel for the view ", name);
    if (slot.isTensor()) {
      slot = bring(slot.toTensor());
    } else if (slot.isTensorList()) {
      std::vector<Tensor> made;
      for (const Tensor& t : slot.toTensorVector()) made.push_back(bring(t));
      slot = c10::IValue(c10::List<Tensor>(made));
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", sim_empty);
  m.impl("empty_strided", sim_empty_strided);
  m.impl("as_strided", sim_as_strided);
  m.impl("view", sim_view);
  m.impl("_reshape_alias", sim_reshape_alias);
  m.impl("unfold", sim_unfold);
  m.impl("resize_", sim_resize);
  m.impl("set_.source_Storage", sim_set_source);
  m.impl("set_.source_Storage_storage_offset", sim_set_storage);
  m.impl("set_.source_Tensor", sim_set_tensor);
  m.impl("_local_scalar_dense", sim_item);
  m.impl("copy_", sim_copy);
  m.impl("record_stream", sim_record_stream);
}

// -- what NCCL is to the engine -----------------------------------------------------------------------------------------

// Like ProcessGroupNCCL: each collective runs on a stream of the group's own, behind what the caller's stream holds;
// `wait` makes the caller's stream wait, and releases the tensors that the work kept alive. The bytes travel over gloo,
// so `wait` also keeps the host; for who waits for whom that is the same, since a stream that waits holds back every
// collective that is issued after it.
struct SimWork final : c10d::Work {
  SimWork(c10d::OpType type, c10::intrusive_ptr<c10d::Work> inner, std::vector<Tensor> kept, int device, Clock done, std::function<void()> then)
      : Work(-1, type), inner(std::move(inner)), kept(std::move(kept)), device(device), done(std::move(done)), then(std::move(then)) {}
  bool wait(std::chrono::milliseconds) override {
    if (inner) inner->wait();
    if (then) then();
    inner.reset(), then = nullptr;
    auto& w = world();
    Guard guard(w.mutex);
    join(w.clocks[here(device)], done);
    kept.clear();
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  bool isCompleted() override { return !inner || inner->isCompleted(); }
  bool isSuccess() const override { return true; }
  c10::intrusive_ptr<c10d::Work> inner;
  std::vector<Tensor> kept;
  int device;
  Clock done;
  std::function<void()> then;
};

struct SimNccl final : c10d::Backend {
  SimNccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo(std::move(gloo)), rank(rank), size(size) {}
  const std::string getBackendName() const override { return "nccl"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return gloo->getBackendOptions(); }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  struct Issued { int device; int stream; uint64_t time; };
  Issued issue(const Tensor& t) {
    auto& w = world();
    TORCH_CHECK(t.is_cuda(), "No backend type associated with device type cpu");
    TORCH_CHECK(t.is_contiguous(), "Tensors must be contiguous");
    int device = t.get_device(), mine = here(device);
    if (!streams.count(device)) streams[device] = guard_impl()->getNewStream(t.device(), 0).id();
    int stream = number_of(device, streams[device]);
    tick(mine);
    join(w.clocks[stream], w.clocks[mine]);
    return {device, stream, tick(stream)};
  }
  c10::intrusive_ptr<c10d::Work> work(c10d::OpType type, const Issued& at, c10::intrusive_ptr<c10d::Work> inner, std::vector<Tensor> kept,
                                      std::function<void()> then = nullptr) {
    return c10::make_intrusive<SimWork>(type, std::move(inner), std::move(kept), at.device, world().clocks[at.stream], std::move(then));
  }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<Tensor>& tensors, const c10d::BroadcastOptions& opts) override {
    Issued at;
    {
      Guard guard(world().mutex);
      at = issue(tensors[0]);
      touch(at.stream, at.time, tensors[0], opts.rootRank != rank, "broadcast");
    }
    std::vector<Tensor> alias = {on_cpu(tensors[0])};
    auto inner = gloo->broadcast(alias, opts);
    return work(c10d::OpType::BROADCAST, at, inner, tensors);
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& opts) override {
    TORCH_CHECK(in.scalar_type() == out.scalar_type(), "output tensor must have the same type as input tensor");
    TORCH_CHECK(in.numel() * size == out.numel(), "output tensor size must be equal to world_size times input tensor size");
    Issued at;
    {
      Guard guard(world().mutex);
      at = issue(out);
      touch(at.stream, at.time, in, false, "all_gather");
      touch(at.stream, at.time, out, true, "all_gather");
    }
    auto flat = on_cpu(out).view({size, -1});
    std::vector<Tensor> mine = {on_cpu(in).reshape(-1).clone()};
    std::vector<std::vector<Tensor>> parts = {flat.unbind(0)};
    c10d::AllgatherOptions copy = opts;
    auto inner = gloo->allgather(parts, mine, copy);
    return work(c10d::OpType::_ALLGATHER_BASE, at, inner, {out, in});
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<Tensor>>& outs, std::vector<Tensor>& in, const c10d::AllgatherOptions& opts) override {
    Issued at;
    std::vector<std::vector<Tensor>> parts(1);
    {
      Guard guard(world().mutex);
      at = issue(in[0]);
      touch(at.stream, at.time, in[0], false, "all_gather");
      for (auto& t : outs[0]) touch(at.stream, at.time, t, true, "all_gather");
    }
    for (auto& t : outs[0]) parts[0].push_back(on_cpu(t));
    std::vector<Tensor> mine = {on_cpu(in[0]).clone()};
    auto inner = gloo->allgather(parts, mine, opts);
    auto kept = outs[0];
    kept.push_back(in[0]);
    return work(c10d::OpType::ALLGATHER, at, inner, kept);
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& opts) override {
    TORCH_CHECK(in.scalar_type() == out.scalar_type(), "input tensor must be the same type as the output tensor.");
    TORCH_CHECK(in.numel() == out.numel() * size, "input tensor must be the same size as output size times world size");
    TORCH_CHECK(opts.reduceOp == c10d::ReduceOp::SUM, "only sums");
    Issued at;
    {
      Guard guard(world().mutex);
      at = issue(in);
      touch(at.stream, at.time, in, false, "reduce_scatter");
      touch(at.stream, at.time, out, true, "reduce_scatter");
    }
    auto from = on_cpu(in).clone(), got = at::empty_like(from), to = on_cpu(out);
    std::vector<int64_t> splits;
    auto inner = gloo->alltoall_base(got, from, splits, splits);
    auto keep_from = from;
    return work(c10d::OpType::_REDUCE_SCATTER_BASE, at, inner, {out, in}, [got, to, keep_from, n = size]() {
      auto rows = got.view({n, -1});
      auto sum = rows[0].clone();
      for (int i = 1; i < n; ++i) sum.add_(rows[i]);
      to.view(-1).copy_(sum);
    });
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& outs, std::vector<int64_t>& ins,
                                               const c10d::AllToAllOptions& opts) override {
    Issued at;
    {
      Guard guard(world().mutex);
      at = issue(in);
      touch(at.stream, at.time, in, false, "all_to_all");
      touch(at.stream, at.time, out, true, "all_to_all");
    }
    auto to = on_cpu(out), from = on_cpu(in).clone();
    auto inner = gloo->alltoall_base(to, from, outs, ins, opts);
    return work(c10d::OpType::ALLTOALL_BASE, at, inner, {out, in}, [from]() {});
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& opts) override {
    Issued at;
    {
      Guard guard(world().mutex);
      at = issue(tensors[0]);
      touch(at.stream, at.time, tensors[0], true, "all_reduce");
    }
    std::vector<Tensor> alias = {on_cpu(tensors[0])};
    auto inner = gloo->allreduce(alias, opts);
    return work(c10d::OpType::ALLREDUCE, at, inner, tensors);
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& opts) override { return gloo->barrier(opts); }

  c10::intrusive_ptr<c10d::Backend> gloo;
  int rank, size;
  std::unordered_map<int, int64_t> streams;
};

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size) {
  return c10::make_intrusive<SimNccl>(gloo, rank, size);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::impl::device_guard_impl_registry[size_t(c10::kCUDA)].store(guard_impl());
  c10::SetAllocator(c10::kCUDA, &device_memory, 255);
  // torch asked for CUDA's hooks while it was imported, and keeps what it got: let that object be one of our class.
  static at::SimHooks hooks{at::CUDAHooksArgs{}};
  auto* kept = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(kept) = *reinterpret_cast<void**>(static_cast<at::CUDAHooksInterface*>(&hooks));
  at::setHostAllocator(at::kCUDA, &pinned_memory, 255);
  m.def("device_count", &device_count);
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int d) { guard_impl()->setDevice({c10::kCUDA, c10::DeviceIndex(d)}); });
  m.def("make_nccl", &make_nccl);
  m.def("host_register", [](uintptr_t pointer, size_t size) { Guard g(world().mutex); world().pinned[pointer] = size; });
  m.def("host_unregister", [](uintptr_t pointer) { Guard g(world().mutex); world().pinned.erase(pointer); });
  m.def("page_locked", [] {
    Guard g(world().mutex);
    size_t total = 0;
    for (auto& [pointer, size] : world().pinned) total += size;
    return total;
  });
  m.def("alias", &on_cpu, "the same bytes as a CPU tensor");
  m.def("races", [] { Guard g(world().mutex); auto found = world().races; world().races.clear(); return found; });
  m.def("syncs", [] { Guard g(world().mutex); auto found = world().syncs; world().syncs.clear(); return found; });
  m.def("ops", [] { Guard g(world().mutex); auto found = world().ops; world().ops.clear(); return found; });
  m.def("set_sync_mode", [](int mode) { world().sync_mode = mode; });
  m.def("sync_mode", [] { return world().sync_mode; });
}
