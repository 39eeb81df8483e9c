"""OpenAI's protocol over HTTP, and what guards it.

Its files, in reading order:

    bodies        what clients send, checked
    reading       a request's body, of a limited size, and whether its client is still there
    guard         who may ask: the token, the name of the host, the origin of a page
    measures      what /metrics tells Prometheus
    replies       what clients get, in OpenAI's form
    chat          /v1/chat/completions
    completions   /v1/completions
    conversation_routes   the chat page, and what it asks for
    app           the application: all routes together
    server        listens on an address until it is told to stop                  [uvicorn]
"""
