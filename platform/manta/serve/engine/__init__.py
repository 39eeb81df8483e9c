"""The texts of many requests at once, token by token, with one cache.

The files:

    request     what the engine is asked, and what it tells about each answer
    scores      log-probabilities of tokens
    row         a request while it is answered
    choice      the next token of each text in a batch
    prefixes    what the model remembers of texts, for texts that begin as they do
    batch       which requests are in a step, and whose caches make room
    budget      how much memory caches may take                         [psutil]
    engine      requests from any thread, and the thread that runs the model
"""
