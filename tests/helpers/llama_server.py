"""llama.cpp's own server with the text model of the bundled Qwen: ``python -m helpers.llama_server MODEL.gguf PORT``.

llama.cpp knows nothing of this project, and its server speaks the protocol in its own way. Its Python package brings
the server with it. Without the vision tower the model does not see images, so questions about none are asked.
"""

import json
import sys
import threading

import numpy as np

from llava_cot.tiny_qwen import tiny_qwen_path

LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONTROL, NORMAL = 3, 1  # kinds of tokens in GGUF


def name_of(tensor):
    """What GGUF calls a tensor of the decoder."""
    name, kind = tensor.rsplit(".", 1)
    if name in TENSORS:
        return f"{TENSORS[name]}.{kind}"
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYERS[part]}.{kind}"


def write_gguf(path):
    """Write the decoder, the tokenizer and the chat template of the bundled Qwen as llama.cpp reads them."""
    import gguf
    from safetensors.numpy import load_file

    folder = tiny_qwen_path()
    config = json.loads((folder / "config.json").read_text())["text_config"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {id: word for word, id in tokenizer["model"]["vocab"].items()} | special
    ids = range(config["vocab_size"])
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # of those that llama.cpp has, it splits numbers as the bundled tokenizer does
    writer.add_token_list([words[id] for id in ids])
    writer.add_token_types([CONTROL if id in special else NORMAL for id in ids])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, values in load_file(folder / "model.safetensors").items():
        if "visual" not in name:
            writer.add_tensor(name_of(name), values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path, port):
    """Run the server until the process ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = 4096, 4
    params.n_gpu_layers = 0
    params.warmup = False
    params.use_jinja = True
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
