# Run once by the image, when its data folder is empty: a database and a user for MLflow.
mariadb --user=root --password="$MARIADB_ROOT_PASSWORD" <<SQL
CREATE DATABASE mlflow;
CREATE USER 'mlflow'@'%' IDENTIFIED BY '$MLFLOW_DB_PASSWORD';
GRANT ALL PRIVILEGES ON mlflow.* TO 'mlflow'@'%';
SQL
