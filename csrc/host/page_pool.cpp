#include "host/page_pool.h"

#include "cpu/isa.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

namespace llava_cot {

PagePool::PagePool(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  constexpr int64_t MAX = std::numeric_limits<int32_t>::max();
  if (num_pages < 0 || num_pages > MAX || page_size < 1 || page_size > MAX) {
    throw std::invalid_argument("num_pages must be in [0, 2**31 - 1] and page_size in [1, 2**31 - 1], got " +
                                std::to_string(num_pages) + " and " + std::to_string(page_size));
  }
  ref_count_.resize(num_pages, 0);
  free_.resize(num_pages);
  for (int64_t i = 0; i < num_pages; ++i) free_[i] = static_cast<int32_t>(num_pages - 1 - i);
}

int64_t PagePool::create() {
  sequences_.emplace(next_handle_, Sequence{});
  return next_handle_++;
}

std::vector<int64_t> PagePool::fork(int64_t seq, int64_t n) {
  const Sequence& parent = find(seq);
  if (n < 0) throw std::invalid_argument("n must be >= 0, got " + std::to_string(n));
  std::vector<int64_t> kids(n);
  for (int64_t& kid : kids) {
    kid = next_handle_++;
    sequences_.emplace(kid, parent);
    for (int32_t page : parent.pages) ++ref_count_[page];
  }
  return kids;
}

PagePool::Appended PagePool::append(std::span<const int64_t> seqs, std::span<const int64_t> counts) {
  std::vector<Extension> extended = extensions(seqs, counts);
  reserve_pages(extended);
  Appended result;
  for (const auto& [sequence, count, copies_tail] : extended) {
    auto& [pages, length, _] = *sequence;
    if (copies_tail) {
      const int32_t source = pages.back();
      pages.back() = take_page();
      result.copies.push_back({source, pages.back()});
    }
    for (const int64_t end = length + count; length < end; ++length) {
      if (length == static_cast<int64_t>(pages.size()) * page_size_) pages.push_back(take_page());
      result.slots.push_back(pages.back() * page_size_ + length % page_size_);
    }
  }
  return result;
}

std::vector<PagePool::Extension> PagePool::extensions(std::span<const int64_t> seqs, std::span<const int64_t> counts) {
  if (seqs.size() != counts.size()) {
    throw std::invalid_argument("counts must have one entry per sequence, " + std::to_string(seqs.size()) + ", got " +
                                std::to_string(counts.size()));
  }
  ++num_appends_;
  std::vector<Extension> extended;
  for (size_t i = 0; i < seqs.size(); ++i) {
    Sequence& sequence = find(seqs[i]);
    if (counts[i] < 0) throw std::invalid_argument("counts must be >= 0, got " + std::to_string(counts[i]));
    if (std::exchange(sequence.last_append, num_appends_) == num_appends_) {
      throw std::invalid_argument("seqs must not repeat a sequence, got " + std::to_string(seqs[i]) + " twice");
    }
    extended.push_back({&sequence, counts[i], false});
  }
  return extended;
}

// Decides which sequences copy their shared partial page. Each holder in turn gives up its reference, and one that is
// the last writes in place. If there are too few free pages, it restores every reference and throws OutOfPages.
void PagePool::reserve_pages(std::span<Extension> extensions) {
  uint64_t needed = 0;
  for (auto& [sequence, count, copies_tail] : extensions) {
    const auto& [pages, length, _] = *sequence;
    const int64_t room = static_cast<int64_t>(pages.size()) * page_size_ - length;
    if (count > room) needed += (count - room - 1) / page_size_ + 1;
    copies_tail = count > 0 && room > 0 && ref_count_[pages.back()] > 1;
    if (copies_tail) --ref_count_[pages.back()], ++needed;
    needed = std::min(needed, uint64_t{1} << 62);  // huge counts must not wrap around
  }
  if (needed <= free_.size()) return;
  for (const auto& [sequence, count, copies_tail] : extensions) {
    if (copies_tail) ++ref_count_[sequence->pages.back()];
  }
  throw OutOfPages("append needs " + std::to_string(needed) + " pages, " + std::to_string(free_.size()) + " are free");
}

void PagePool::truncate(int64_t seq, int64_t length) {
  Sequence& sequence = find(seq);
  if (length < 0 || length > sequence.length) {
    throw std::invalid_argument("length must be in [0, " + std::to_string(sequence.length) + "], got " +
                                std::to_string(length));
  }
  shrink(sequence, length);
}

void PagePool::free(int64_t seq) {
  shrink(find(seq), 0);
  sequences_.erase(seq);
}

int64_t PagePool::ref_count(int64_t page) const {
  if (page < 0 || page >= num_pages()) {
    throw std::invalid_argument("page must be in [0, " + std::to_string(num_pages() - 1) + "], got " +
                                std::to_string(page));
  }
  return ref_count_[page];
}

std::vector<int64_t> PagePool::sequences() const {
  std::vector<int64_t> handles;
  for (const auto& [handle, _] : sequences_) handles.push_back(handle);
  std::sort(handles.begin(), handles.end());
  return handles;
}

const PagePool::Sequence& PagePool::find(int64_t seq) const {
  const auto found = sequences_.find(seq);
  if (found == sequences_.end()) throw UnknownSequence("sequence " + std::to_string(seq) + " is freed or unknown");
  return found->second;
}

int32_t PagePool::take_page() {
  const int32_t page = free_.back();
  free_.pop_back();
  ref_count_[page] = 1;
  return page;
}

void PagePool::shrink(Sequence& sequence, int64_t length) {
  sequence.length = length;
  while (static_cast<int64_t>(sequence.pages.size()) > (length + page_size_ - 1) / page_size_) {
    const int32_t page = sequence.pages.back();
    sequence.pages.pop_back();
    if (--ref_count_[page] == 0) free_.push_back(page);
  }
}

}  // namespace llava_cot

namespace {

namespace py = pybind11;
using llava_cot::PagePool;
using Handles = std::vector<int64_t>;
using TableArray = py::array_t<int32_t, py::array::c_style>;

// The stable ABI has no Python binding of its tensors, so results are passed as numpy arrays. No bytes are copied.
py::object as_tensor(const py::array& array) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> from_numpy;
  from_numpy.call_once_and_store_result([] { return py::module_::import("torch").attr("from_numpy"); });
  return from_numpy.get_stored()(array);
}

py::tuple append(PagePool& pool, const Handles& seqs, const Handles& counts) {
  const PagePool::Appended appended = pool.append(seqs, counts);
  const auto num_copies = static_cast<py::ssize_t>(appended.copies.size());
  py::array_t<int64_t> slots(static_cast<py::ssize_t>(appended.slots.size()));
  py::array_t<int32_t> copies({num_copies, py::ssize_t{2}});
  std::copy(appended.slots.begin(), appended.slots.end(), slots.mutable_data());
  for (py::ssize_t i = 0; i < num_copies; ++i) {
    copies.mutable_at(i, 0) = appended.copies[i].source;
    copies.mutable_at(i, 1) = appended.copies[i].target;
  }
  return py::make_tuple(as_tensor(slots), as_tensor(copies));
}

// Checks a caller's table and returns its memory.
py::array_t<int32_t> writable_table(const py::object& out, py::ssize_t rows, py::ssize_t width) {
  const py::object array = out.attr("numpy")();
  if (!py::isinstance<py::array_t<int32_t>>(array)) {
    throw py::type_error("out must be int32, got " + std::string(py::str(out.attr("dtype"))));
  }
  auto table = py::reinterpret_borrow<py::array_t<int32_t>>(array);
  if (table.ndim() != 2 || table.shape(0) != rows || table.shape(1) < width) {
    throw py::value_error("out must be [" + std::to_string(rows) + ", at least " + std::to_string(width) + "], got " +
                          std::string(py::str(out.attr("shape"))));
  }
  return table;
}

py::object page_table(const PagePool& pool, const Handles& seqs, const py::object& out) {
  size_t width = 1;
  for (int64_t seq : seqs) width = std::max(width, pool.pages(seq).size());
  const auto rows = static_cast<py::ssize_t>(seqs.size());
  auto table = out.is_none() ? py::array_t<int32_t>({rows, static_cast<py::ssize_t>(width)})
                             : writable_table(out, rows, static_cast<py::ssize_t>(width));
  auto entries = table.mutable_unchecked<2>();
  for (py::ssize_t row = 0; row < rows; ++row) {
    const std::vector<int32_t>& pages = pool.pages(seqs[row]);
    const auto used = static_cast<py::ssize_t>(pages.size());
    for (py::ssize_t i = 0; i < used; ++i) entries(row, i) = pages[i];
    for (py::ssize_t i = used; i < table.shape(1); ++i) entries(row, i) = 0;
  }
  return out.is_none() ? as_tensor(table) : out;
}

std::string repr(const PagePool& pool) {
  return "PagePool(num_pages=" + std::to_string(pool.num_pages()) + ", page_size=" + std::to_string(pool.page_size()) +
         ", num_free=" + std::to_string(pool.num_free()) + ")";
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const llava_cot::Loops* loops : llava_cot::available_loops()) names.emplace_back(loops->name);
  return names;
}

void set_isa(const std::string& name) {
  if (llava_cot::use_loops(name)) return;
  std::string available;
  for (const std::string& isa : available_isas()) available += (available.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("isa must be one that this CPU has (" + available + "), got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TARGET_ABI") = static_cast<uint64_t>(TORCH_TARGET_VERSION);
  m.def("isa", [] { return llava_cot::loops().name; }, "The instruction set whose loops the CPU ops run.");
  m.def("available_isas", &available_isas, "The instruction sets to choose from on this CPU, best first.");
  m.def("set_isa", &set_isa, py::arg("isa"), "Makes the CPU ops run the loops of another instruction set, for tests.");
  py::register_exception<llava_cot::OutOfPages>(m, "OutOfPages", PyExc_RuntimeError).doc() =
      "Raised when an append needs more pages than are free. The append has then changed nothing.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const llava_cot::UnknownSequence& unknown) {
      py::set_error(PyExc_KeyError, unknown.what());
    }
  });
  py::class_<PagePool>(m, "PagePool", R"(Assigns the pages of a KV cache to sequences, which fork without copying.

A sequence is an integer handle, which is never reused. Its token t is in slot page * page_size + t % page_size of
the cache, where page is entry t // page_size of its row in page_table. Forked sequences share pages. Only the last,
partial page is ever copied, when one of its holders writes. At any time, free pages + pages with a reference ==
num_pages. A freed or unknown handle raises KeyError.

Source: block tables and copy-on-write of PagedAttention, arXiv:2309.06180.)")
      .def(py::init<int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"))
      .def("create", &PagePool::create, "Creates an empty sequence and returns its handle.")
      .def("fork", &PagePool::fork, py::arg("seq"), py::arg("n"),
           "Creates n sequences with the tokens of seq, which stays usable. It counts references and takes no page.")
      .def("append", &append, py::arg("seqs"), py::arg("counts"),
           R"(Makes room for counts[i] more tokens in seqs[i].

Returns (slots, copies). slots is a CPU int64 tensor [sum(counts)]: the slots of the new tokens, sequence by sequence.
copies is a CPU int32 tensor [m, 2]: pairs (source page, target page) of shared partial pages. Make these copies before
any new token is written. When several of seqs share a partial page, the last in list order that leaves it at reference
count 1 writes in place. So k sharers alone make k - 1 copies. Count 0 is a no-op.

Raises OutOfPages exactly when fewer pages are free than that needs, and ValueError for repeated sequences, negative
counts or lists of different length. Nothing has changed then.)")
      .def("truncate", &PagePool::truncate, py::arg("seq"), py::arg("length"),
           "Drops the tokens from length on. If the last, partial page is shared, the next write copies it.")
      .def("free", &PagePool::free, py::arg("seq"), "Drops the sequence and its references to pages.")
      .def("page_table", &page_table, py::arg("seqs"), py::arg("out") = py::none(),
           R"(Returns the pages of seqs: CPU int32 [len(seqs), P], padded with 0, where P >= 1 is the most pages of any.

If out is given, fills and returns it. It must be a CPU int32 tensor [len(seqs), at least P].)")
      .def("length", &PagePool::length, py::arg("seq"), "Returns the number of tokens in the sequence.")
      .def("sequences", &PagePool::sequences, "Returns the handles that are not freed, oldest first.")
      .def("ref_count", &PagePool::ref_count, py::arg("page"),
           "Returns how many sequences hold the page; 0 if it is free.")
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_sequences", &PagePool::num_sequences, "The number of sequences that are not freed.")
      .def("__repr__", &repr);
}
