"""What a tuned prompt leaves in a run's folder: its numbers, and how to use them."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save_file

from privtune_flwr.federated.whole import WholeModel

PROMPT_FILE = "prompt.safetensors"
_README = """# A soft prompt that belongs to this model

`{file}` holds `prompt`, ({tokens}, {hidden}): vectors that stand {where}, **above** the embeddings:
no position is added to them where a model adds positions there (rotary ones count them). The other
files are an ordinary checkpoint, and without the prompt it is not the model that was tuned.
{head}
"""
_OWN_HEAD = """
The head is the checkpoint's. A head that takes a mean takes it over the text, not over the prompt.
"""
_NAMED_HEAD = """
**The checkpoint's own classifier is untrained and must not be used.** The search found, beside the
prompt, `scale` and `bias`: logits = `scale` * cos(mean state of the text's tokens, `classes`) +
`bias`, where `classes`, ({classes}, {hidden}), are directions of sentences that name the classes.
"""


def save_prompt(model: WholeModel, folder: Path) -> None:
    """Save what an ordinary checkpoint cannot hold, and a page that says how to use it.

    Parameters
    ----------
    model : WholeModel
        Nothing is written if it has no prompt.
    folder : Path
        Where its checkpoint lies.
    """
    arrays = model.beside()
    if not arrays:
        return
    save_file(arrays, folder / PROMPT_FILE)
    tokens, hidden = arrays["prompt"].shape
    encoder = model.top.family.kind == "encoder"
    head = _OWN_HEAD
    if "classes" in arrays:
        head = _NAMED_HEAD.format(classes=len(arrays["classes"]), hidden=hidden)
    page = _README.format(
        file=PROMPT_FILE,
        tokens=tokens,
        hidden=hidden,
        where="behind the first token" if encoder else "before the first token",
        head=head,
    )
    (folder / "PROMPT.md").write_text(page, encoding="utf-8")
