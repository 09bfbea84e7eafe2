//! `limit` and `offset` of a list.
//!
//! Nodes order a list of collections by their own UUIDs, so a page of one node is not a page of the other: the proxy
//! fetches whole lists and pages itself. It therefore has to read the query exactly as Chroma does, and leave to Chroma
//! the answer to everything that Chroma does not read.

use url::form_urlencoded;

/// The page a client asked for; absent: from the start, without an end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Page {
    /// Number of items at most.
    pub limit: Option<usize>,
    /// Number of items to skip.
    pub offset: Option<usize>,
}

impl Page {
    /// Reads a query string (without `?`). Other keys are ignored, as Chroma ignores them.
    ///
    /// # Errors
    /// The query itself, if Chroma would answer 400 to it: forward it and let Chroma say why.
    pub fn parse(query: &str) -> Result<Page, &str> {
        let mut page = Page::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let slot = match key.as_ref() {
                "limit" => &mut page.limit,
                "offset" => &mut page.offset,
                _ => continue,
            };
            let number: u32 = value.parse().map_err(|_| query)?;
            if slot.replace(number as usize).is_some() {
                return Err(query); // Chroma: duplicate field
            }
        }
        Ok(page)
    }

    /// The items of this page.
    pub fn cut<T>(self, items: Vec<T>) -> Vec<T> {
        items
            .into_iter()
            .skip(self.offset.unwrap_or(0))
            .take(self.limit.unwrap_or(usize::MAX))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_chroma_reads() {
        let page = |limit, offset| Ok(Page { limit, offset });
        assert_eq!(Page::parse(""), page(None, None));
        assert_eq!(Page::parse("limit=10&offset=5"), page(Some(10), Some(5)));
        assert_eq!(Page::parse("limit=0"), page(Some(0), None));
        assert_eq!(Page::parse("l%69mit=1&x=%ff&x"), page(Some(1), None));
        assert_eq!(Page::parse("limit=%2B1"), page(Some(1), None));
    }

    #[test]
    fn leaves_to_chroma_what_chroma_refuses() {
        for query in [
            "limit=",
            "limit=-1",
            "limit=+1",
            "limit=x",
            "limit=1&limit=2",
            "limit=4294967296",
            "offset=null",
        ] {
            assert_eq!(Page::parse(query), Err(query));
        }
    }

    #[test]
    fn cuts_a_list() {
        let cut = |query| Page::parse(query).unwrap().cut(vec![1, 2, 3]);
        assert_eq!(cut("limit=1&offset=1"), [2]);
        assert!(cut("offset=9").is_empty());
        assert_eq!(cut(""), [1, 2, 3]);
    }
}
