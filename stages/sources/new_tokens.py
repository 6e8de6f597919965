"""Tokens that a recipe adds to a model: in its tokenizer, and as rows of its embeddings and head.

A new token is a special one: text of users that looks like it stays text. Its rows, and the head's bias where it has
one, start as the mean of all others', so that it is neither likely nor unlikely before it is trained.
"""

from collections.abc import Sequence
from pathlib import Path

from stages.errors import UserError
from stages.stage import Facts


def add(folder: Path, tokens: Sequence[str]) -> Facts:
    """Add tokens to the model in a folder. Raises UserError when its tokenizer has one of them already."""
    import torch
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoModelForCausalLM

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    for token in tokens:
        if tokenizer.token_to_id(token) is not None:
            raise UserError(f"fetch.model.new_tokens: the model's tokenizer has {token!r} already: leave it out")
    before = tokenizer.get_vocab_size(with_added_tokens=True)
    taken = set(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    # Whoever reads the file counts new tokens on from the vocabulary's size, whatever ids it says.
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = [vocabulary[token] for token in tokens]
    if clash := taken.intersection(ids):
        raise UserError(
            f"fetch.model.new_tokens: the ids of the model's tokenizer have gaps, and a new token would get "
            f"{min(clash)}, which another token has: add fewer tokens"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    rows = model.get_input_embeddings().weight.shape[0]
    size = max(ids) + 1
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            for weight in module.parameters():  # a head may have a bias, too
                weight[ids] = weight[:before].float().mean(0).to(weight.dtype)
    for old in (*folder.glob("*.safetensors*"), folder / "config.json", path):
        old.unlink()  # which may be another file's link
    model.save_pretrained(folder)
    tokenizer.save(str(path))
    return {"new_tokens": dict(zip(tokens, ids, strict=True))}
