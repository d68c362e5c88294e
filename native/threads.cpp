#include "threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace chalot {
namespace {

// A pause takes 40 to 140 cycles, some 15 to 50 ns.
constexpr int kSpins = 6000;  // 0.1 to 0.3 ms: longer than what lies between two tokens
// At a barrier: 0.1 to 0.2 ms. Who gives a core away sooner gets it back only when another process has had its turn,
// some 3 ms; but where two threads have to share a core, each barrier costs them this.
constexpr int kPatience = 4000;
#if defined(__x86_64__) || defined(_M_X64)
constexpr uint32_t kMxcsr = 0x1f80;
#endif

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until ready() is true; after a while gives the core away between looks.
template <class Ready>
void spin_until(Ready ready) {
  for (int i = 0; i < kPatience; i++) {
    if (ready()) return;
    relax();
  }
  while (!ready()) std::this_thread::yield();
}

}  // namespace

PlainArithmetic::PlainArithmetic() {
#if defined(__x86_64__) || defined(_M_X64)
  saved_ = _mm_getcsr();
  _mm_setcsr(kMxcsr);
#elif defined(__aarch64__)
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" ::"r"(0ull));
#endif
}

PlainArithmetic::~PlainArithmetic() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_setcsr(uint32_t(saved_));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" ::"r"(saved_));
#endif
}

Pool::Pool(int threads) : size_(threads) {
  try {
    for (int id = 1; id < threads; id++) workers_.emplace_back([this, id] { work(id); });
  } catch (...) {  // the system has no more threads: those that run must end before their handles do
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void Pool::run(const std::function<void(int)>& job) {
  if (size_ > 1) {
    job_ = &job;
    running_.store(size_ - 1, std::memory_order_relaxed);
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
  }
  {
    PlainArithmetic plain;
    job(0);
  }
  spin_until([&] { return running_.load(std::memory_order_acquire) == 0 || size_ == 1; });
}

void Pool::work(int id) {
  PlainArithmetic plain;
  for (uint32_t seen = 0;;) {
    for (int i = 0; i < kSpins && started_.load(std::memory_order_acquire) == seen; i++) relax();
    started_.wait(seen, std::memory_order_acquire);
    seen++;
    if (stop_) return;
    (*job_)(id);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::wait_past(uint32_t now) {
  spin_until([&] { return passed_.load(std::memory_order_acquire) != now; });
}

}  // namespace chalot
