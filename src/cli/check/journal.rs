//! Is the log there? Only looked at: tables are made by `run`, and the term is not touched.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Row};
use tokio::time::timeout;

use super::Finding;
use crate::config::Wal;

const LIMIT: Duration = Duration::from_secs(5);
const TERM: &str = "SELECT term, holder FROM diptych_lease";
/// No row: nobody holds the lease.
const POSTGRES_LEFT: &str = "SELECT CAST(EXTRACT(EPOCH FROM expires_at - clock_timestamp()) AS BIGINT) \
     FROM diptych_lease_end WHERE expires_at > clock_timestamp()";
/// Postgres' code for a table that is not there.
const NO_TABLE: &str = "42P01";

pub async fn reach(wal: &Wal) -> Finding {
    let looking = async {
        match wal.url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => postgres(&wal.url).await,
            Some(("sqlite", _)) => sqlite(&wal.url).await,
            _ => Err("neither postgres:// nor sqlite://".to_owned()),
        }
    };
    match timeout(LIMIT, looking).await {
        Ok(finding) => finding,
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

async fn postgres(url: &str) -> Finding {
    let options = PgConnectOptions::from_str(url).map_err(text)?;
    let mut connection = options.connect().await.map_err(text)?;
    let version: String = sqlx::query_scalar("SHOW server_version")
        .fetch_one(&mut connection)
        .await
        .map_err(text)?;
    let found = match sqlx::query(TERM).fetch_one(&mut connection).await {
        Ok(row) => {
            let found = last(
                row.try_get(0).map_err(text)?,
                &row.try_get::<String, _>(1).map_err(text)?,
            );
            format!("{found}{}", held(&mut connection).await?)
        }
        Err(error) if has_no_table(&error) => may_create(&mut connection).await?,
        Err(error) => return Err(text(error)),
    };
    let _ = connection.close().await;
    Ok(format!("Postgres {version}; {found}"))
}

fn has_no_table(error: &sqlx::Error) -> bool {
    let error = error.as_database_error();
    error.and_then(|error| error.code()).as_deref() == Some(NO_TABLE)
}

/// Whether that one holds the lease now.
async fn held(connection: &mut PgConnection) -> Finding {
    let left: Option<i64> = match sqlx::query_scalar(POSTGRES_LEFT).fetch_optional(connection).await {
        Ok(left) => left,
        // Made by a version without leases; the next start adds it.
        Err(error) if has_no_table(&error) => None,
        Err(error) => return Err(text(error)),
    };
    Ok(match left {
        Some(left) => {
            format!(", who holds the lease for {left} s more: while it is renewed, another Diptych could not start")
        }
        None => String::new(),
    })
}

async fn may_create(connection: &mut PgConnection) -> Finding {
    let allowed: Option<bool> = sqlx::query_scalar("SELECT has_schema_privilege(current_schema(), 'CREATE')")
        .fetch_one(connection)
        .await
        .map_err(text)?;
    match allowed {
        Some(true) => Ok("empty: the tables are made at the first start".to_owned()),
        _ => Err("has no tables of ours, and this user may not create any".to_owned()),
    }
}

async fn sqlite(url: &str) -> Finding {
    let options = SqliteConnectOptions::from_str(url).map_err(text)?;
    let path = options.get_filename().to_path_buf();
    if !path.exists() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        return match may_write(folder) {
            true => Ok(format!("{} will be made at the first start", path.display())),
            false => Err(format!(
                "{} cannot be made: {} is no folder that we may write to",
                path.display(),
                folder.display()
            )),
        };
    }
    let mut connection = options.read_only(true).connect().await.map_err(text)?;
    let row = sqlx::query(TERM).fetch_one(&mut connection).await.map_err(text)?;
    let found = last(
        row.try_get(0).map_err(text)?,
        &row.try_get::<String, _>(1).map_err(text)?,
    );
    let _ = connection.close().await;
    let mut lock = path.clone().into_os_string();
    lock.push(".lock");
    let used = std::fs::File::open(lock).is_ok_and(|lock| lock.try_lock_shared().is_err());
    let used = if used {
        "; a Diptych runs on it now, and another could not start"
    } else {
        ""
    };
    Ok(format!("SQLite file {}; {found}{used}", path.display()))
}

fn last(term: i64, holder: &str) -> String {
    match term {
        0 => "never used".to_owned(),
        _ => format!("last written by {holder} in term {term}"),
    }
}

fn may_write(folder: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(name) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: `name` is a C string that lives during the call.
    folder.is_dir() && unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

fn text(error: sqlx::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wal(url: String) -> Wal {
        Wal { url, ..Wal::default() }
    }

    #[tokio::test]
    async fn a_fresh_file_is_not_made_by_looking() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wal.db");
        let finding = reach(&wal(format!("sqlite://{}", path.display()))).await;
        assert!(finding.unwrap().contains("will be made"));
        assert!(!path.exists());
        let nowhere = reach(&wal(format!("sqlite://{}/not/there.db", folder.path().display()))).await;
        assert!(nowhere.unwrap_err().contains("cannot be made"));
    }

    #[tokio::test]
    async fn a_log_in_use_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let wal = wal(format!("sqlite://{}", folder.path().join("wal.db").display()));
        let journal = crate::journal::open(&wal.url, 1).await.unwrap();
        let holder = crate::journal::Holder::named("pid 7");
        journal.take_term(&holder, None).await.unwrap();
        let used = reach(&wal).await.unwrap();
        assert!(used.contains("last written by pid 7 in term 1"), "{used}");
        assert!(used.contains("runs on it now"), "{used}");
    }
}
