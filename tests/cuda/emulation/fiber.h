// Fibers: stacks between which one OS thread switches, and what the sanitizers need to know about
// them.
//
// Only emulator.cpp uses them. It is never compiled with -fsanitize=thread, because all fibers
// share the scheduler's state, and TSan would report that as races of the kernel. Instead it is
// compiled with -DSIMPO_EMULATION_TSAN=1, which tells TSan about the fibers and what orders them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMPO_EMULATION_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define SIMPO_EMULATION_INSTRUMENTED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMPO_EMULATION_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__) || defined(SIMPO_EMULATION_INSTRUMENTED)
#error "compile the emulator with -DSIMPO_EMULATION_TSAN=1 and without -fsanitize=thread"
#endif

#if SIMPO_EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if SIMPO_EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#define SIMPO_EMULATION_UCONTEXT 1
#endif

#if SIMPO_EMULATION_UCONTEXT
#include <ucontext.h>
#else
// Saves the caller's registers on its stack and its stack pointer in *suspended. Then returns from
// the call that saved resumed.
extern "C" void simpo_emulation_switch_stack(void** suspended, void* resumed);
// The System V ABI lets a function clobber all registers but these six.
asm(R"(
  .pushsection .text
  .globl simpo_emulation_switch_stack
  .hidden simpo_emulation_switch_stack
  .type simpo_emulation_switch_stack, @function
simpo_emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simpo_emulation_switch_stack, . - simpo_emulation_switch_stack
  .popsection
)");
#endif

namespace simpo_ext::emulation {

// ---- happens-before, as TSan sees it --------------------------------------------------------

// An event that some threads reach and others wait for. TSan identifies it by its address.
struct SyncPoint {
  char address = 0;

  void release() {
#if SIMPO_EMULATION_TSAN
    __tsan_release(&address);
#endif
  }

  void acquire() {
#if SIMPO_EMULATION_TSAN
    __tsan_acquire(&address);
#endif
  }
};

// TSan sees malloc, free and memset even in code that it did not instrument. The emulator's use of
// its own memory while a thread runs must neither look like a race nor order anything.
class HiddenFromTsan {
 public:
  HiddenFromTsan() {
#if SIMPO_EMULATION_TSAN
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~HiddenFromTsan() {
#if SIMPO_EMULATION_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
  }
  HiddenFromTsan(const HiddenFromTsan&) = delete;
  HiddenFromTsan& operator=(const HiddenFromTsan&) = delete;
};

// ---- contexts -------------------------------------------------------------------------------

// A fiber, or the OS thread that resumed the first fiber. Both can be suspended.
struct Context {
#if SIMPO_EMULATION_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_bottom = nullptr;  // ASan fills in those of an OS thread
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// The context whose stack the running context has to describe to ASan.
inline Context* last_suspended = nullptr;

// The first action of a context that runs again, and of a fiber that runs for the first time.
inline void arrive_in([[maybe_unused]] Context& context) {
#if SIMPO_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(context.asan_fake_stack, &last_suspended->stack_bottom,
                                  &last_suspended->stack_bytes);
#endif
}

// Suspends the running context, from, until a switch to it.
inline void switch_context(Context& from, Context& to) {
  last_suspended = &from;
#if SIMPO_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if SIMPO_EMULATION_TSAN
  constexpr unsigned kNoSync = 1;  // by default, a switch would order everything
  __tsan_switch_to_fiber(to.tsan_fiber, kNoSync);
#endif
#if SIMPO_EMULATION_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  simpo_emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrive_in(from);
}

// Makes context stand for the running OS thread, before it switches to a fiber.
inline void become_host(Context& context) {
  context = Context{};
#if SIMPO_EMULATION_TSAN
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

// Makes context a fiber that calls entry at the first switch to it. entry must never return. The
// stack is never freed.
inline void become_fiber(Context& context, void (*entry)(), unsigned index) {
  constexpr size_t kPage = 4096;
  // Large, because a sanitizer's report runs on this stack and needs more than a kernel. Pages that
  // are not used take up no memory. An odd number of pages, because stacks a power of two apart
  // would share a few sets of the cache and the TLB.
  constexpr size_t kStackBytes = 65 * kPage;
  char* memory = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  // An access to the lowest page faults, so that an overflow does not reach another stack.
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    std::perror("cuda emulation: no memory for a stack");
    std::abort();
  }
  context.stack_bottom = memory + kPage;
  // If all stacks began at the same offset in their pages, they would evict each other from the
  // cache.
  constexpr size_t kCacheLine = 64;
  context.stack_bytes = kStackBytes - kPage - index % (kPage / kCacheLine) * kCacheLine;
#if SIMPO_EMULATION_TSAN
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
#if SIMPO_EMULATION_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = memory + kPage;
  context.registers.uc_stack.ss_size = context.stack_bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  void** top = reinterpret_cast<void**>(memory + kPage + context.stack_bytes);
  *--top = nullptr;  // entry's return address: the end of every backtrace
  *--top = reinterpret_cast<void*>(entry);
  constexpr int kSavedRegisters = 6;
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

}  // namespace simpo_ext::emulation
