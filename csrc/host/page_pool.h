// Host bookkeeping of a paged KV cache: which pages hold which sequence, and how many sequences hold a page.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace llava_cot {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct UnknownSequence : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A sequence of `length` tokens holds ceil(length / page_size) pages. After a fork, sequences share full pages for
// good, and a partial last page until one of its holders writes. Token t of a sequence is in slot
// pages[t / page_size] * page_size + t % page_size. At any time, free pages + pages with a reference == num_pages.
class PagePool {
 public:
  struct Copy {
    int32_t source, target;
  };
  struct Appended {
    std::vector<int64_t> slots;  // slots of all new tokens, sequence by sequence
    std::vector<Copy> copies;    // make all before any write; targets are distinct, fresh and never sources
  };

  PagePool(int64_t num_pages, int64_t page_size);

  int64_t create();
  std::vector<int64_t> fork(int64_t seq, int64_t n);
  Appended append(std::span<const int64_t> seqs, std::span<const int64_t> counts);
  void truncate(int64_t seq, int64_t length);
  void free(int64_t seq);

  const std::vector<int32_t>& pages(int64_t seq) const { return find(seq).pages; }
  int64_t length(int64_t seq) const { return find(seq).length; }
  int64_t ref_count(int64_t page) const;
  int64_t num_pages() const { return static_cast<int64_t>(ref_count_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  std::vector<int64_t> sequences() const;

 private:
  struct Sequence {
    std::vector<int32_t> pages;
    int64_t length = 0;
    uint64_t last_append = 0;  // detects a sequence that one append names twice
  };
  struct Extension {
    Sequence* sequence;
    int64_t count;
    bool copies_tail;
  };

  const Sequence& find(int64_t seq) const;
  Sequence& find(int64_t seq) { return const_cast<Sequence&>(std::as_const(*this).find(seq)); }
  std::vector<Extension> extensions(std::span<const int64_t> seqs, std::span<const int64_t> counts);
  void reserve_pages(std::span<Extension> extensions);
  int32_t take_page();
  void shrink(Sequence& sequence, int64_t length);

  int64_t page_size_;
  int64_t next_handle_ = 0;
  uint64_t num_appends_ = 0;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::vector<int32_t> ref_count_;  // [num_pages]
  std::vector<int32_t> free_;       // a stack: the page freed last is the warmest
};

}  // namespace llava_cot
