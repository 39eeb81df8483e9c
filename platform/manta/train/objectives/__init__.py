"""What a run learns from its batches: the seam between the loop, which is the same for all kinds of
training, and what is different about each kind.

Its files, in reading order:

    next_token   a micro batch, and the objective of pretraining: each next token
    answers      the objective of conversations: the tokens of their answers
    weights      the weight of each micro batch's loss in the mean of a step
"""
