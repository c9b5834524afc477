// Memory of large results. For a large block, malloc maps new pages at every call and returns them to Linux when the
// block is freed. Mapping and clearing these pages can take longer than the kernel that fills them. So freed blocks
// wait here for the next result. Blocks lie on huge pages where Linux has them.
#pragma once
#include <pthread.h>
#include <sys/mman.h>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace bi {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kKeptBytes = 512 << 20;  // of free blocks; beyond, a freed block goes back to Linux

// Asks for huge pages for the whole ones in [p, p + bytes), which nothing has written to yet. Linux may decline.
inline void ask_for_huge_pages(void* p, size_t bytes) {
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
#if defined(MADV_HUGEPAGE)
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

class Blocks {
 public:
  struct Block {
    void* data;
    size_t size;  // bytes, a multiple of a huge page
  };

  // A block of at least `bytes`. Its contents are undefined. Throws std::bad_alloc.
  Block* take(size_t bytes) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto found = free_.lower_bound(size);
      if (found != free_.end() && found->first <= 2 * size) {
        Block* const block = found->second;
        free_.erase(found);
        kept_ -= block->size;
        return block;
      }
    }
    // Room for the alignment is mapped and given back.
    void* const got = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    char* const p = static_cast<char*>(got);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(p) % kHugePage) % kHugePage;
    if (before) munmap(p, before);
    munmap(p + before + size, kHugePage - before);
    ask_for_huge_pages(p + before, size);
    return new Block{p + before, size};
  }

  void give(Block* block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    free_.emplace(block->size, block);
    kept_ += block->size;
    while (kept_ > kKeptBytes) {
      const auto largest = std::prev(free_.end());
      Block* const dropped = largest->second;
      free_.erase(largest);
      kept_ -= dropped->size;
      munmap(dropped->data, dropped->size);
      delete dropped;
    }
  }

  // Of this process. Never destroyed: a result may live as long as the process.
  static Blocks& all() {
    static Blocks* const held = new Blocks;
    // A child of fork() has only the thread that forked: no other thread may hold the mutex then.
    static const int once = pthread_atfork([] { held->mutex_.lock(); }, [] { held->mutex_.unlock(); },
                                           [] { held->mutex_.unlock(); });
    (void)once;
    return *held;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, Block*> free_;
  size_t kept_ = 0;  // bytes of free_
};

}  // namespace bi
