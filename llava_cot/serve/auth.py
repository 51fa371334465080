class Guard:
    def __init__(self, app, keys, host, limits):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
