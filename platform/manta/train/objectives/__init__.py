"""What a run learns from its batches: the seam between the loop, which is the same for all kinds of
training, and what is different about each kind.

Its files, in reading order:

    next_token   a micro batch, and the objective of pretraining: each next token
    answers      the objective of conversations: the tokens of their answers
    dpo          the loss of direct preference optimization, and its config
    preference   the objective of pairs: the chosen answer is to gain on the rejected one
    labels       the objective of a classifier: the label of each text
    weights      the weight of each micro batch's loss in the mean of a step
"""
