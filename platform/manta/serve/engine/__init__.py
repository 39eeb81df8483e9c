"""The texts of many requests at once, token by token, with one cache.

The files:

    request     what the engine is asked, and what it tells about each answer
"""
