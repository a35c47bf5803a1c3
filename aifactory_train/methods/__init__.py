"""Training methods beside plain supervised fine-tuning (docs/methods.md). Each is a block of the recipe:

``methods.preference`` DPO, ORPO, KTO · ``methods.goldfish`` tokens that never carry loss · ``methods.neftune`` noise on
embeddings · ``data.train[].share`` replay of general data · ``model.vocabulary`` tokens for a new language.

The loop calls :class:`Methods` at a few places; without any of these blocks it does what the loop would do by itself. A
step is still defined by its documents alone: what a method adds (noise, masks, references, the KL estimate) is a
function of documents and step, or a sum over all ranks, so that ranks, accumulation, packing and engine do not change
the curve.
"""
