"""Trained models that answer: a chat page, and a server that speaks OpenAI's protocol.

The rooms:

    engine      the texts of many requests at once, token by token, with one cache
"""
