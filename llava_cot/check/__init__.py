"""The conformance kit: does a model give the same through the engine as through transformers?"""
