"""`serve`: a network in the browser and over HTTP."""


def serve(run: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Try a network in the browser, or use it over HTTP: a page, and an API that answers as `predict` does.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    host
        Address to listen on; by default only this machine can reach it.
    port
        Port to listen on; 0 takes any that is free.
    """
    from resnetlab import api
    from resnetlab import serve as server
    from resnetlab.console import Terminal

    server.check()
    opened = api.load(run)
    terminal = Terminal()
    card = opened.bundle.card
    terminal.line(f"serve {run}: {card.model.name}, {len(card.classes)} classes, image side {card.preprocess.size} px")
    opened.serve(host=host, port=port, display=terminal)
