"""What the library needs of the machine; nothing here knows about preferences.

Open `files` first: files are written atomically, and `UserError` is the one exception whose message is for users.
`progress` has the progress bar, `kaggle` finds attached inputs (the only module that knows Kaggle's folders), `devices`
chooses device and precision, and has the experiment trackers.
"""
