import json


def parse_body(data):
    return json.loads(data)
