from fastapi import APIRouter


def page_router():
    return APIRouter()
