"""Answers of models to a file of questions, and a judge's scores of them.

Its files, in reading order:

    settings            settings of answers and judgements
    questions           questions from a person's file, with reference answers
    records             lines of JSON that are kept as they come, for a job that goes on
    answers             what each model answers
    prompts             what a judge is asked, and what of its reply is a verdict
    endpoint            a judge behind an OpenAI-compatible endpoint
    checkpoint_judge    a checkpoint as a judge, by the probabilities of its verdicts
    statistics          means, and intervals over questions and over repeats of the judge
    asking              every judgement, asked once
    report              the table, the sentences and the JSON
    judge               the whole
"""
