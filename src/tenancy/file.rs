//! The tenants file: organizations, their users, and the digests of these users' API keys, in TOML. It is read as a whole, and
//! every problem is reported at once.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::key::KeyDigest;

/// Larger files are refused.
const MAX_BYTES: u64 = 8 << 20;
/// The most problems that are listed.
const MAX_PROBLEMS: usize = 20;
const MAX_ID_BYTES: usize = 64;

/// A valid file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantsFile {
    pub organizations: Vec<Organization>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Organization {
    pub id: String,
    pub users: Vec<User>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub id: String,
    pub keys: Vec<KeyDigest>,
}

/// Everything that is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct TenantsError {
    problems: Vec<String>,
}

impl fmt::Display for TenantsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        write!(f, "tenants_file has {count} {}:", if count == 1 { "problem" } else { "problems" })?;
        self.problems.iter().take(MAX_PROBLEMS).try_for_each(|problem| write!(f, "\n  {problem}"))?;
        if count > MAX_PROBLEMS { write!(f, "\n  and {} more", count - MAX_PROBLEMS) } else { Ok(()) }
    }
}

impl TenantsError {
    fn one(problem: impl fmt::Display) -> Self {
        Self { problems: vec![problem.to_string().trim_end().to_owned()] }
    }
}

impl TenantsFile {
    pub fn read(path: &Path) -> Result<Self, TenantsError> {
        Self::parse(&contents(path)?)
    }

    pub fn parse(text: &str) -> Result<Self, TenantsError> {
        let table: toml::Table = text.parse().map_err(|error| misspelt(text, &error))?;
        let mut reader = Reader::default();
        let file = reader.file(table);
        match reader.problems.is_empty() {
            true => Ok(file),
            false => Err(TenantsError { problems: reader.problems }),
        }
    }

    /// The same for files with the same users and keys, in whatever order.
    pub fn digest(&self) -> u64 {
        let mut rows: Vec<String> = self
            .users()
            .flat_map(|(organization, user)| {
                user.keys.iter().map(move |key| format!("{organization}/{} {key}\n", user.id))
            })
            .collect();
        rows.sort_unstable();
        let digest = Sha256::digest(rows.concat());
        u64::from_le_bytes(std::array::from_fn(|index| digest[index]))
    }

    /// All users, with the ids of their organizations.
    pub fn users(&self) -> impl Iterator<Item = (&str, &User)> {
        self.organizations
            .iter()
            .flat_map(|organization| organization.users.iter().map(|user| (organization.id.as_str(), user)))
    }
}

pub(super) fn contents(path: &Path) -> Result<String, TenantsError> {
    let unreadable = |error: std::io::Error| TenantsError::one(format_args!("{}: {error}", path.display()));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(TenantsError::one(format_args!("{} is longer than {MAX_BYTES} bytes", path.display())));
    }
    Ok(text)
}

/// The error's own text quotes the line, which may hold a key that somebody pasted there.
fn misspelt(text: &str, error: &toml::de::Error) -> TenantsError {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    TenantsError::one(format_args!("line {}: {}", before.matches('\n').count() + 1, error.message()))
}

/// Collects the problems.
#[derive(Default)]
struct Reader {
    problems: Vec<String>,
    /// Who holds each key.
    holders: BTreeMap<KeyDigest, String>,
}

impl Reader {
    fn file(&mut self, mut table: toml::Table) -> TenantsFile {
        let organizations = self.list("", &mut table, "organization");
        self.refuse_rest("", &table);
        let organizations = organizations.into_iter().enumerate().map(|(index, table)| {
            let place = format!("organization {}", index + 1);
            self.organization(place, table)
        });
        let organizations: Vec<Organization> = organizations.collect();
        self.refuse_twins("", organizations.iter().map(|organization| organization.id.as_str()));
        TenantsFile { organizations }
    }

    fn organization(&mut self, place: String, mut table: toml::Table) -> Organization {
        let (id, place) = self.id(place, "organization", &mut table);
        let users = self.list(&place, &mut table, "user");
        self.refuse_rest(&place, &table);
        let users = users.into_iter().enumerate().map(|(index, table)| {
            let place = format!("{place}, user {}", index + 1);
            self.user(&id, place, table)
        });
        let users: Vec<User> = users.collect();
        self.refuse_twins(&place, users.iter().map(|user| user.id.as_str()));
        Organization { id, users }
    }

    fn user(&mut self, organization: &str, place: String, mut table: toml::Table) -> User {
        let (id, place) = self.id(place, "user", &mut table);
        let keys = self.list(&place, &mut table, "key");
        self.refuse_rest(&place, &table);
        let holder = format!("{organization}/{id}");
        let keys = keys.into_iter().enumerate();
        let keys = keys.filter_map(|(index, table)| self.key(&holder, &format!("{place}, key {}", index + 1), table));
        User { keys: keys.collect(), id }
    }

    fn key(&mut self, holder: &str, place: &str, mut table: toml::Table) -> Option<KeyDigest> {
        let digest = match table.remove("sha256") {
            Some(toml::Value::String(hex)) => KeyDigest::parse(&hex),
            _ => None,
        };
        self.refuse_rest(place, &table);
        let Some(digest) = digest else {
            self.problem(
                place,
                "`sha256` must be the 64 hexadecimal digits of the key's digest (`outrigger keys new`)",
            );
            return None;
        };
        if let Some(other) = self.holders.insert(digest, holder.to_owned()) {
            self.problem(place, &format!("the key is already that of {other}"));
        }
        Some(digest)
    }

    /// The id, and the place with it.
    fn id(&mut self, place: String, what: &str, table: &mut toml::Table) -> (String, String) {
        let is_fine = |id: &String| {
            let may_contain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(may_contain)
        };
        match table.remove("id") {
            Some(toml::Value::String(id)) if is_fine(&id) => {
                let before = place.rsplit_once(what).map_or("", |(before, _)| before);
                let place = format!("{before}{what} `{id}`");
                (id, place)
            }
            _ => {
                let rule = format!("`id` must have 1 to {MAX_ID_BYTES} letters, digits, `.`, `_` or `-`");
                self.problem(&place, &rule);
                (String::new(), place)
            }
        }
    }

    /// Takes a list of tables out of the table.
    fn list(&mut self, place: &str, table: &mut toml::Table, name: &str) -> Vec<toml::Table> {
        let mut tables = Vec::new();
        let items = match table.remove(name) {
            None => return tables,
            Some(toml::Value::Array(items)) => items,
            Some(_) => {
                self.problem(place, &format!("`{name}` must be a list: write `[[…{name}]]` with two brackets"));
                return tables;
            }
        };
        for item in items {
            match item {
                toml::Value::Table(table) => tables.push(table),
                _ => self.problem(place, &format!("`{name}` must be a list of tables")),
            }
        }
        tables
    }

    fn refuse_rest(&mut self, place: &str, table: &toml::Table) {
        for name in table.keys() {
            self.problem(place, &format!("`{name}` is not a known field"));
        }
    }

    fn refuse_twins<'a>(&mut self, place: &str, ids: impl Iterator<Item = &'a str>) {
        let mut counts = BTreeMap::<&str, usize>::new();
        ids.filter(|id| !id.is_empty()).for_each(|id| *counts.entry(id).or_default() += 1);
        for (id, _) in counts.into_iter().filter(|(_, count)| *count > 1) {
            self.problem(place, &format!("the id `{id}` is used more than once"));
        }
    }

    fn problem(&mut self, place: &str, what: &str) {
        let colon = if place.is_empty() { "" } else { ": " };
        self.problems.push(format!("{place}{colon}{what}"));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problems(text: &str) -> Vec<String> {
        TenantsFile::parse(text).expect_err(text).problems
    }

    fn with_user(rest: &str) -> String {
        format!("[[organization]]\nid = \"acme\"\n[[organization.user]]\nid = \"ana\"\n{rest}")
    }

    #[test]
    fn a_file_is_read() {
        let (ana, bob) = (KeyDigest::of("ana's"), KeyDigest::of("bob's"));
        let text = format!(
            "# who may use it\n{}\n[[organization.user]]\nid = \"bob\"\n[[organization.user.key]]\nsha256 = \"{bob}\"\n\
             [[organization]]\nid = \"other\"\n",
            with_user(&format!("[[organization.user.key]]\nsha256 = \"{ana}\"")),
        );
        let file = TenantsFile::parse(&text).expect("valid");
        let users: Vec<_> =
            file.users().map(|(organization, user)| (organization, user.id.as_str(), &*user.keys)).collect();
        assert_eq!(users, [("acme", "ana", &[ana][..]), ("acme", "bob", &[bob])]);
        assert_eq!(file.organizations[1].users, []);
        assert_eq!(TenantsFile::parse(""), Ok(TenantsFile::default()));
    }

    #[test]
    fn the_digest_depends_on_users_and_keys_alone() {
        let user = |id: &str, keys: &[&str]| {
            let keys =
                keys.iter().map(|key| format!("[[organization.user.key]]\nsha256 = \"{}\"\n", KeyDigest::of(key)));
            format!("[[organization.user]]\nid = \"{id}\"\n{}", keys.collect::<String>())
        };
        let digest = |users: &[String]| {
            TenantsFile::parse(&format!("[[organization]]\nid = \"o\"\n{}", users.concat())).expect("valid").digest()
        };
        let first = digest(&[user("a", &["1", "2"]), user("b", &["3"])]);
        assert_eq!(digest(&[user("b", &["3"]), user("a", &["2", "1"]), user("c", &[])]), first);
        for other in [[user("a", &["1"]), user("b", &["3"])], [user("a", &["1"]), user("b", &["2", "3"])]] {
            assert_ne!(digest(&other), first);
        }
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let key = KeyDigest::of("k");
        let text = with_user(&format!(
            "requests_per_hour = 3\n\
             [[organization.user.key]]\nsha256 = \"12\"\n\
             [[organization.user.key]]\nsha256 = \"{key}\"\n\
             [[organization.user]]\nid = \"ana\"\n[[organization.user.key]]\nsha256 = \"{key}\"\n\
             [[organization]]\nid = \"a b\"\n[[organization.user]]\nid = 7"
        ));
        let id = "`id` must have 1 to 64 letters, digits, `.`, `_` or `-`";
        assert_eq!(
            problems(&text),
            [
                "organization `acme`, user `ana`: `requests_per_hour` is not a known field",
                "organization `acme`, user `ana`, key 1: `sha256` must be the 64 hexadecimal digits of the key's digest \
                 (`outrigger keys new`)",
                "organization `acme`, user `ana`, key 1: the key is already that of acme/ana",
                "organization `acme`: the id `ana` is used more than once",
                &format!("organization 2: {id}"),
                &format!("organization 2, user 1: {id}"),
            ]
        );
        let error = TenantsFile::parse(&text).expect_err("it has problems").to_string();
        assert!(error.starts_with("tenants_file has 6 problems:\n  organization `acme`, user"), "{error}");
    }

    #[test]
    fn other_shapes_are_explained() {
        assert_eq!(
            problems("[organization]\nid = \"a\""),
            ["`organization` must be a list: write `[[…organization]]` with two brackets"]
        );
        assert_eq!(problems("organization = [1]"), ["`organization` must be a list of tables"]);
        assert_eq!(problems("[[organisation]]"), ["`organisation` is not a known field"]);
        let quoteless = problems("[[organization]]\nid = sk-secret\n");
        assert!(quoteless[0].starts_with("line 2: ") && !quoteless[0].contains("secret"), "{quoteless:?}");
        let many: String = (0..30).map(|index| format!("field{index} = 1\n")).collect();
        let error = TenantsFile::parse(&many).expect_err("unknown fields").to_string();
        assert!(error.starts_with("tenants_file has 30 problems") && error.ends_with("\n  and 10 more"), "{error}");
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tenants.toml");
        let error = TenantsFile::read(&path).expect_err("it is missing").to_string();
        assert!(error.contains("tenants.toml: "), "{error}");
        std::fs::write(&path, "#".repeat(MAX_BYTES as usize + 1)).expect("written");
        let error = TenantsFile::read(&path).expect_err("too long").to_string();
        assert!(error.contains("is longer than 8388608 bytes"), "{error}");
        std::fs::write(&path, [0xff]).expect("written");
        assert!(TenantsFile::read(&path).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "(\\[\\[organization(\\.user(\\.key)?)?\\]\\]|id = \"[a-c ]{0,2}\"|sha256 = \"[0-9a-f]{64}\"|x = 1|\n){0,12}") {
            if let Ok(file) = TenantsFile::parse(&text) {
                for (organization, user) in file.users() {
                    prop_assert!(!organization.is_empty() && !user.id.is_empty());
                }
            }
        }
    }
}
