"""A report of a run: what was trained on what, and what came of it.

Its files, in reading order:

    private     texts without the places where things are
    facts       values with the file and the key that they come from
    planned     the plan of a run next to what came of it
    sections    what a person wants to know of a run
    pictures    losses and the course of training
    page        the report as one web page
    report      `report`, which writes the page and its facts as JSON
"""
