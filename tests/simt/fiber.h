// Fibers: stacks and the switch between them, with the notices that the sanitizers need to follow. The engine that
// includes this is itself compiled without a sanitizer; SIMT_ASAN and SIMT_TSAN say what the kernels were compiled with.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <mutex>
#include <vector>

#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* p, size_t size);
}
#define SIMT_ON_ASAN(...) __VA_ARGS__
#else
#define SIMT_ON_ASAN(...)
#endif

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* p);
void __tsan_release(void* p);
void __tsan_read_range(void* p, unsigned long size);
void __tsan_write_range(void* p, unsigned long size);
}
#define SIMT_ON_TSAN(...) __VA_ARGS__
#else
#define SIMT_ON_TSAN(...)
#endif

#ifndef __x86_64__
#error "the simulator switches stacks on x86-64 only; simt_switch needs about 15 lines for another CPU"
#endif
// Saves the callee-saved registers and the stack pointer of the running fiber, and takes up those of another.
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");

namespace simt {

// A stack, above a page that may not be touched, and what TSan knows of whoever runs on it: kept together, or accesses of
// one fiber to its stack would race with those of another.
struct Strand {
  static constexpr size_t kSize = 256 << 10;
  char* bottom = nullptr;
  void* tsan = nullptr;

  static Strand make() {
    Strand s;
    void* p = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, 4096, PROT_NONE)) __builtin_trap();
    s.bottom = static_cast<char*>(p);
    SIMT_ON_ASAN(__asan_unpoison_memory_region(p, kSize);)
    SIMT_ON_TSAN(s.tsan = __tsan_create_fiber(0);)
    return s;
  }
  void destroy() {
    SIMT_ON_TSAN(__tsan_destroy_fiber(tsan);)
    munmap(bottom, kSize);
  }

  // The stack pointer with which simt_switch enters `entry`, which never returns.
  void* prepare(void (*entry)()) const {
    void** sp = reinterpret_cast<void**>(bottom + kSize);
    *--sp = nullptr;  // where a return address would be: keeps the alignment of a call
    *--sp = reinterpret_cast<void*>(entry);
    for (int registers = 0; registers < 6; ++registers) *--sp = nullptr;
    return sp;
  }
};

// Strands of one block, taken from those that earlier launches left: making them costs more than most blocks.
class Strands {
 public:
  explicit Strands(unsigned count) {
    std::lock_guard lock(mutex_);
    for (unsigned i = 0; i < count; ++i) {
      if (idle_.empty()) idle_.push_back(Strand::make());
      strands_.push_back(idle_.back());
      idle_.pop_back();
    }
  }
  // After a fault threads stand in the middle of their code, and will never run on.
  void abandon() {
    for (Strand& s : strands_) s.destroy();
    strands_.clear();
  }
  ~Strands() {
    std::lock_guard lock(mutex_);
    idle_.insert(idle_.end(), strands_.begin(), strands_.end());
  }
  Strands(const Strands&) = delete;
  const Strand& operator[](unsigned i) const { return strands_[i]; }

 private:
  std::vector<Strand> strands_;
  static inline std::mutex mutex_;
  static inline std::vector<Strand> idle_;
};

}  // namespace simt
