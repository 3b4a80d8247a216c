"""The configuration as one document: written, read, compared and restored.

    sections.py   what is in it, as a table: a new model is one entry
    values.py     columns as a document holds them
    document.py   the whole, made from the database, and as text
    reading.py    text of strangers into a document, within bounds
    foreign.py    what other systems write, as a document
    restoring.py  a document into the database, all or nothing
    files.py      the backup on disk and its former versions

A document names every object by its uid, slug or name, never by a number of the database. Sealed secrets stay sealed.
"""
