"""Hand-written attention, traced: the layer's own forward runs, and the kernel computes.

1. `families` lists the classes whose forward computes attention by hand: those that tests prove to
   give the same numbers, and those that cannot, with the reason.
2. `patch` gives each such layer a forward that calls the class's own within `mode.tracing`, under
   which every torch function passes a `mode.Tracer`.
3. A product of two tensors (matmul, bmm, baddbmm, einsum, scaled_dot_product_attention) returns
   `scores.TracedScores` instead of a tensor. These record queries, keys, scale, additive terms,
   bool masks and the shape they stand for.
4. `rules` holds a rule for each function that follows, by its name: it returns new traced scores,
   or None. `tail` holds what only a few families need.
5. None for scores: they are materialised, and the recorded functions run on real tensors. A layer
   makes a bias out of another product in this way.
6. None for probabilities, which are never materialised: an error that names the layer and says how
   to unpatch it. A layer that lowered nothing is refused too, unless no values are known
   (`tensor_cache.is_symbolic`): then it computes attention as it always did.
7. The product of probabilities and values is lowered: `batch_dims` turns whatever batch shape the
   layer has into [batch, heads], terms of -1e4 and less become masks and the rest a bias, and
   `flash_attention` runs once.
8. Tensors' versions tell of edits in place, and so does a list that scores share with their views.
9. Masks arrive as a `MaskProxy`, which stands for the float tensor that eager attention gets, so
   nothing dense is built.

Its price: a graph break at every compiled layer, a look at values where a rule depends on them, and
that a score of -1e4 counts as hidden.
"""
