//! Finding stop strings in streamed text.

use super::TextError;

/// Result of a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopEvent {
    /// Text that can be shown: no part of it can become the beginning of a stop string.
    pub text: String,
    /// The stop string that ended the sequence, if any.
    pub matched: Option<String>,
}

/// Finds stop strings in text that arrives in pieces.
///
/// The match that ends first wins; of several that end at the same place, the longest. So the result does not
/// depend on how the text is split into pieces.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    include_in_output: bool,
    /// The end of the text, which may be the beginning of a stop string.
    held: String,
    matched: Option<String>,
}

impl StopStrings {
    /// Searches for `stops`. With `include_in_output` the match itself is part of the text.
    ///
    /// # Errors
    /// [`TextError::EmptyStopString`] if one of them is empty.
    pub fn new(stops: &[String], include_in_output: bool) -> Result<Self, TextError> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(TextError::EmptyStopString { index }),
            None => Ok(Self {
                stops: stops.to_vec(),
                include_in_output,
                held: String::new(),
                matched: None,
            }),
        }
    }

    /// Adds a piece of text. After a match, further pieces are discarded, and the event repeats the match.
    pub fn push(&mut self, piece: &str) -> StopEvent {
        if self.matched.is_some() {
            return StopEvent { text: String::new(), matched: self.matched.clone() };
        }
        self.held.push_str(piece);
        let release = match self.first_match() {
            Some((start, stop)) => {
                let end = if self.include_in_output { start + stop.len() } else { start };
                self.matched = Some(stop);
                end
            }
            None => self.held.len() - self.possible_start(),
        };
        let rest = self.held.split_off(release);
        let text = std::mem::replace(&mut self.held, rest);
        if self.matched.is_some() {
            self.held.clear();
        }
        StopEvent { text, matched: self.matched.clone() }
    }

    /// Returns the text held back, at the end of the text.
    pub fn finish(&mut self) -> StopEvent {
        StopEvent { text: std::mem::take(&mut self.held), matched: self.matched.clone() }
    }

    /// The match that ends first: its start and its stop string.
    fn first_match(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        let first = found.min_by_key(|(start, stop)| (start + stop.len(), *start));
        first.map(|(start, stop)| (start, stop.clone()))
    }

    /// Length in bytes of the longest end of the held text that begins a stop string.
    fn possible_start(&self) -> usize {
        let text = self.held.as_bytes();
        let longest = |stop: &String| {
            let longest = text.len().min(stop.len() - 1);
            let begins = |n: &usize| stop.as_bytes().get(..*n).is_some_and(|s| text.ends_with(s));
            (1..=longest).rev().find(begins).unwrap_or(0)
        };
        // The bytes match the beginning of a string exactly, so they begin at a character boundary.
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn search(stops: &[&str], include_in_output: bool) -> StopStrings {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        StopStrings::new(&stops, include_in_output).unwrap()
    }

    /// All released text, and the match.
    fn run<'a>(mut search: StopStrings, pieces: impl IntoIterator<Item = &'a str>) -> StopEvent {
        let mut text = String::new();
        for piece in pieces {
            text += &search.push(piece).text;
        }
        let last = search.finish();
        StopEvent { text: text + &last.text, matched: last.matched }
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held_back() {
        let mut search = search(&["</end>", "\n\n"], false);
        assert_eq!(search.push("one <").text, "one ");
        assert_eq!(search.push("/e").text, "");
        assert_eq!(search.push("xit> two\n").text, "</exit> two");
        assert_eq!(search.push("three").text, "\nthree");
        let event = search.push(" </end> four");
        assert_eq!(event, StopEvent { text: " ".to_owned(), matched: Some("</end>".to_owned()) });
        assert_eq!(search.push("five").text, "");
        assert_eq!(search.finish().text, "");
    }

    #[test]
    fn the_match_is_in_the_output_only_on_request() {
        assert_eq!(run(search(&["END"], true), ["a E", "ND b"]).text, "a END");
        assert_eq!(run(search(&["END"], false), ["a E", "ND b"]).text, "a ");
        assert_eq!(run(search(&["END"], false), ["a E", "N"]).text, "a EN");
    }

    #[test]
    fn the_first_completed_stop_string_wins() {
        let matched = |stops: &[&str], text| run(search(stops, false), [text]).matched.unwrap();
        assert_eq!(matched(&["abc", "b"], "xabc"), "b");
        assert_eq!(matched(&["bc", "abc"], "xabc"), "abc");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopStrings::new(&["a".to_owned(), String::new()], false).unwrap_err();
        assert!(matches!(error, TextError::EmptyStopString { index: 1 }));
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            stops in prop::collection::vec("[aé🦙]{1,4}", 0..4),
            text in "[aé🦙b]{0,24}",
            include: bool,
        ) {
            let whole = run(StopStrings::new(&stops, include).unwrap(), [text.as_str()]);
            let letters = text.char_indices().map(|(i, c)| &text[i..i + c.len_utf8()]);
            let cut = run(StopStrings::new(&stops, include).unwrap(), letters);
            prop_assert_eq!(&cut, &whole);
            let rest = text.strip_prefix(&whole.text).unwrap();
            match &whole.matched {
                None => prop_assert!(rest.is_empty() && !stops.iter().any(|s| text.contains(s))),
                Some(stop) if include => prop_assert!(whole.text.ends_with(stop)),
                Some(stop) => prop_assert!(rest.starts_with(stop)),
            }
        }
    }
}
