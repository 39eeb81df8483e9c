"""Trained models that answer: a chat page, and a server that speaks OpenAI's protocol.

In reading order:

    settings        the settings of the server
    engine          the texts of many requests at once, token by token, with one cache
    refusal         what a client did wrong, in the form of OpenAI's errors
    dialogue        a conversation as ids: what fits, and what is left out, which is said
    served          the models that are served, and their answers as streams of events
    conversations   conversations of the chat page, kept in SQLite
    protocol        OpenAI's protocol over HTTP, and what guards it         [fastapi, uvicorn]
    loading         the models of a config, loaded and ready to answer
    replicas        copies of the server on a Ray cluster                   [ray.serve]
    serve           `serve`, which loads models and answers until it is told to stop
"""
