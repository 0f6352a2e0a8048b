// Runs one launch of a kernel, read from stdin, on the CPU, and writes to stdout what the tensors hold afterwards.
//
// In: name (u32 length, bytes); blocks x, y, z, threads a block, bytes of shared memory, seed of the order (u32 each);
// number of arguments (u32), each with its kind (u32): 0, a number of 4 bytes; 1, a tensor (u32 length in bytes, bytes);
// 2, no tensor; 3, a tensor not yet written (u32 length), filled with NaN; 4, a table by value (u32 number of words, each an
// argument of the other kinds, in 8 bytes). Out: the tensors in their order.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {
namespace {

constexpr size_t STACK = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    bool is_there;
};

struct Fiber {
    ucontext_t context;
    void* stack;
    void* shadow = nullptr; // ThreadSanitizer's
    unsigned index;
    bool is_done = false, is_waiting = false;
    unsigned block_waits = 0, warp_waits = 0, exchanges = 0;
    std::vector<Copy> copies;
};

struct Warp {
    unsigned arrived = 0, exchanged = 0;
    const char* site = nullptr;
    Given given[2];
    char token[2];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned arrived = 0;
    char token[2];
    unsigned char* shared;
};

Block* block;
Fiber* running;
ucontext_t scheduler;
void* scheduler_shadow;
Index at_block, n_blocks, n_threads;
const std::string* kernel_name;
void (*kernel)(void* const*);
void* const* kernel_arguments;
/// What was done before the launch is seen by its threads, what they did by who waits for it; blocks see nothing of others.
char before_launch, after_launch;

std::map<std::string, std::pair<void (*)(void* const*), size_t>>& kernels() {
    static std::map<std::string, std::pair<void (*)(void* const*), size_t>> all;
    return all;
}

[[noreturn]] void fail(const std::string& why) {
    fprintf(stderr, "%s: %s\n", kernel_name ? kernel_name->c_str() : "emulation", why.c_str());
    exit(3);
}

void acquire(void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

void release(void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(token);
#else
    (void)token;
#endif
}

/// Without an order between what is left and what is entered.
UNWATCHED void change(ucontext_t& from, ucontext_t& to, void* shadow, void* stack, size_t size, bool is_last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(is_last ? nullptr : &fake, stack, size);
    swapcontext(&from, &to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)stack, (void)size, (void)is_last;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(shadow, __tsan_switch_to_fiber_no_sync);
#else
    (void)shadow;
#endif
    swapcontext(&from, &to);
#endif
}

void* main_stack;
size_t main_stack_size;

UNWATCHED void leave(bool is_last) {
    Fiber* self = running;
    change(self->context, scheduler, scheduler_shadow, main_stack, main_stack_size, is_last);
}

UNWATCHED void wait() {
    running->is_waiting = true;
    leave(false);
}

UNWATCHED void finish() {
    if (!running->copies.empty()) fail("a thread ends without having waited for its copies");
    running->is_done = true;
    release(&after_launch);
    leave(true);
}

UNWATCHED void body() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_stack) main_stack = const_cast<void*>(bottom), main_stack_size = size;
#endif
    acquire(&before_launch);
    kernel(kernel_arguments);
    finish();
}

/// A stack and ThreadSanitizer's idea of who runs on it. Blocks take them in turn, each block another one for the same
/// thread: only what one of them runs is in an order.
struct Place {
    void* stack;
    void* shadow;
};

UNWATCHED const Place& place(size_t i) {
    static std::vector<Place> places;
    while (places.size() <= i) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a stack");
        void* shadow = nullptr;
#if defined(__SANITIZE_THREAD__)
        shadow = __tsan_create_fiber(0);
#endif
        places.push_back({stack, shadow});
    }
    return places[i];
}

UNWATCHED void make(Fiber& fiber, unsigned index, unsigned n_blocks_before) {
    const Place& own = place((index + n_blocks_before) % n_threads.x);
    fiber.index = index;
    fiber.stack = own.stack;
    fiber.shadow = own.shadow;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, STACK); // another fiber may have died there
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
}

UNWATCHED void run_block(uint64_t& lot, unsigned n_blocks_before) {
    std::vector<Fiber*> ready;
    for (unsigned i = 0; i < block->fibers.size(); i++) make(block->fibers[i], i, n_blocks_before);
    for (;;) {
        ready.clear();
        bool is_over = true;
        for (Fiber& fiber : block->fibers) {
            is_over &= fiber.is_done;
            if (!fiber.is_done && !fiber.is_waiting) ready.push_back(&fiber);
        }
        if (is_over) break;
        if (ready.empty()) fail("threads wait for others that do not come: a barrier or warp instruction not reached by all");
        // Each of the ready ones once, in an order drawn by lot.
        for (size_t n = ready.size(); n > 0; n--) {
            lot ^= lot << 13, lot ^= lot >> 7, lot ^= lot << 17;
            std::swap(ready[lot % n], ready[n - 1]);
            running = ready[n - 1];
            change(scheduler, running->context, running->shadow, running->stack, STACK, false);
        }
    }
}

} // namespace

UNWATCHED Index thread_index() { return {running->index, 0, 0}; }
UNWATCHED Index block_index() { return at_block; }
UNWATCHED Index block_size() { return n_threads; }
UNWATCHED Index grid_size() { return n_blocks; }
UNWATCHED unsigned char* shared_bytes() { return block->shared; }

UNWATCHED void block_barrier() {
    Fiber* self = running;
    void* token = &block->token[self->block_waits++ % 2];
    release(token);
    if (++block->arrived == block->fibers.size()) {
        block->arrived = 0;
        for (Fiber& fiber : block->fibers) fiber.is_waiting = false;
    } else {
        wait();
    }
    acquire(token);
}

namespace {
UNWATCHED bool arrive(unsigned& arrived, unsigned warp) {
    if (++arrived < 32) return false;
    arrived = 0;
    for (unsigned i = 32 * warp; i < 32 * warp + 32; i++) block->fibers[i].is_waiting = false;
    return true;
}
} // namespace

UNWATCHED void warp_barrier() {
    unsigned index = running->index / 32;
    Warp& warp = block->warps[index];
    if (warp.exchanged != 0) fail("lanes of a warp at different instructions");
    void* token = &warp.token[running->warp_waits++ % 2];
    release(token);
    if (!arrive(warp.arrived, index)) wait();
    acquire(token);
}

UNWATCHED const Given& among_lanes(const uint32_t* own, int n_words, const char* site) {
    Fiber* self = running;
    unsigned index = self->index / 32;
    Warp& warp = block->warps[index];
    if (warp.arrived != 0 || (warp.exchanged != 0 && warp.site != site)) fail("lanes of a warp at different instructions");
    warp.site = site;
    // Two buffers in turn: the next instruction's values can come before the slowest lane has read these.
    unsigned turn = self->exchanges++ % 2;
    for (int i = 0; i < n_words; i++) warp.given[turn].words[self->index % 32][i] = own[i];
    if (!arrive(warp.exchanged, index)) wait();
    return warp.given[turn];
}

UNWATCHED uint32_t word_of(const Given& given, int lane, int i) { return given.words[lane][i]; }

UNWATCHED void begin_copy(void* to, const void* from, bool is_there) { running->copies.push_back({to, from, is_there}); }

namespace {
UNWATCHED std::vector<Copy> take_copies() {
    std::vector<Copy> copies;
    copies.swap(running->copies);
    return copies;
}
} // namespace

void finish_copies() {
    for (const Copy& copy : take_copies()) {
        for (int i = 0; i < 4; i++) {
            uint32_t word = copy.is_there ? static_cast<const uint32_t*>(copy.from)[i] : 0;
            static_cast<uint32_t*>(copy.to)[i] = word;
        }
    }
}

Kernel::Kernel(const char* name, void (*run)(void* const*), size_t n_arguments) { kernels()[name] = {run, n_arguments}; }

} // namespace emulation

using namespace emulation;

static void read_exactly(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) fail("the request ends too early");
}

static uint32_t number() {
    uint32_t value;
    read_exactly(&value, 4);
    return value;
}

struct Tensor {
    unsigned char* bytes;
    size_t size;
};

static Tensor tensor(bool is_given) {
    size_t size = number();
    auto* bytes = static_cast<unsigned char*>(malloc(size));
    if (is_given) read_exactly(bytes, size);
    else memset(bytes, 0xff, size);
    return {bytes, size};
}

/// A number, or where a tensor is.
static uint64_t word(uint32_t kind, std::vector<Tensor>& tensors) {
    switch (kind) {
    case 0: return number();
    case 1:
    case 3: tensors.push_back(tensor(kind == 1)); return (uint64_t)tensors.back().bytes;
    case 2: return 0;
    default: fail("an argument of unknown kind");
    }
}

int main() {
    std::string name(number(), ' ');
    read_exactly(name.data(), name.size());
    kernel_name = &name;
    n_blocks.x = number(), n_blocks.y = number(), n_blocks.z = number();
    n_threads = {number(), 1, 1};
    size_t shared = number();
    uint64_t lot = number() * 0x9e3779b97f4a7c15ull + 1;
    auto found = kernels().find(name);
    if (found == kernels().end()) fail("no such kernel");
    if (n_threads.x % 32 != 0) fail("threads come in warps of 32");
    std::vector<Tensor> tensors;
    std::vector<std::vector<uint64_t>> values(number());
    for (std::vector<uint64_t>& words : values) {
        uint32_t kind = number();
        words.resize(kind == 4 ? number() : 1);
        for (uint64_t& each : words) each = word(kind == 4 ? number() : kind, tensors);
    }
    if (values.size() != found->second.second) fail("another number of arguments than the kernel has");
    std::vector<void*> arguments;
    for (std::vector<uint64_t>& words : values) arguments.push_back(words.data());
    kernel = found->second.first;
    kernel_arguments = arguments.data();
#if defined(__SANITIZE_THREAD__)
    scheduler_shadow = __tsan_get_current_fiber();
#endif
    // Kept to the end: a block must not see another's, and their memory must not be taken for shared.
    std::vector<Block*> blocks;
    for (unsigned z = 0; z < n_blocks.z; z++) {
        for (unsigned y = 0; y < n_blocks.y; y++) {
            for (unsigned x = 0; x < n_blocks.x; x++) {
                at_block = {x, y, z};
                block = new Block{std::vector<Fiber>(n_threads.x), std::vector<Warp>(n_threads.x / 32)};
                block->shared = static_cast<unsigned char*>(malloc(shared));
                memset(block->shared, 0xff, shared);
                blocks.push_back(block);
                release(&before_launch);
                run_block(lot, (unsigned)blocks.size() - 1);
            }
        }
    }
    acquire(&after_launch);
    for (Block* each : blocks) {
        free(each->shared);
        delete each;
    }
    for (const Tensor& each : tensors) {
        if (fwrite(each.bytes, 1, each.size, stdout) != each.size) fail("cannot write the result");
        free(each.bytes);
    }
    return 0;
}
