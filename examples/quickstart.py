# SPDX-License-Identifier: Apache-2.0
"""The three lines, on the model that this repository carries. A CPU and about two minutes are enough.

Replace `MODEL` by a model of your own, `documents` by your texts and "tiny_cpu" by "dms_cr4" or "dms_cr8".
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.evaluation.tasks import make_episodes, training_documents

MODEL = Path(__file__).parent / "embedded_model"


def main(argv: list[str] | None = None) -> None:
    """Compress the model, ask it something, and show what its cache still holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's")
    parser.add_argument("--documents", type=int, default=512, help="training documents")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    documents = [x.ids for x in training_documents(tokenizer, args.documents, length=1024, seed=0)]

    overrides = {} if args.steps is None else {"retrofit.steps": args.steps}
    model = dms.compress(
        model, "tiny_cpu", tokenizer=tokenizer, data=documents, overrides=overrides
    )

    episode = make_episodes("recall", tokenizer, length=1024, count=1, seed=1)[0]
    question = episode.questions[0]
    inputs = tokenizer.pad(
        {"input_ids": [episode.context_ids + question.prompt_ids]}, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=len(question.answer_ids), do_sample=False)
    print(f"asked:    {tokenizer.decode(question.prompt_ids)!r}")
    print(f"expected: {tokenizer.decode(question.answer_ids)!r}")
    print(f"answered: {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :])!r}")
    print(dms.kv_stats(model))


if __name__ == "__main__":
    main()
