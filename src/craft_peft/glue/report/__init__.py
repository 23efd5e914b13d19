"""From result files to tables, pictures and plain words.

- Reading: `reading` (folders to results), `transforms` (saved adapters)
- Comparing: `grouping` (methods x tasks x seeds), `significance`, `published` (other people's figures)
- Showing: `words`, `tables` and `markdown`, `pictures`, `page`
"""
