// The list of all ops. Every op fills outputs that its Python wrapper allocated and returns nothing, so that a schema
// and its implementations cannot drift apart. Each csrc/{cpu,cuda}/<stem> ends with the registration of its own
// kernels.
#include "registration.h"

DEFINE_OPS(m) {
  // paged_kv
  m.def("store_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping) -> ()");
  m.def("copy_pages(Tensor(a!) kv_cache, Tensor copies) -> ()");
  // attention
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor cu_seqlens_q, Tensor? prefix_group, Tensor? prefix_lens, float softmax_scale, "
      "int window, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "shared_attention(Tensor query, Tensor key, Tensor value, Tensor group, Tensor cu_seqlens_k, "
      "float softmax_scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  // linear
  m.def("few_row_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor(a!) out) -> ()");
  // sampling
  m.def(
      "sample(Tensor logits, Tensor row, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
      "Tensor position, Tensor? tag_table, Tensor? tag_ends, Tensor? token_bytes, Tensor? token_offsets, "
      "Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) entropy, Tensor(d!) sampling_logprob, "
      "Tensor(e!) tag_state, Tensor(f!) tag, Tensor(g!) overhang, Tensor(h!) status) -> ()");
  // logprob
  m.def("token_logprobs(Tensor logits, Tensor targets, Tensor(a!) logprobs) -> ()");
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, float temperature, "
      "Tensor(a!) logprobs, Tensor(b!) lse, Tensor(c!) entropy, Tensor(d!)? logits=None) -> ()");
  m.def(
      "linear_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, "
      "Tensor targets, Tensor lse, Tensor entropy, float temperature, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor? logits=None) -> ()");
}
